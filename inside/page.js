"use strict";
// The page that look.py writes. Its data are the tokens and, for each layer, what the layer did (inside/page.py has the format);
// what a row holds and what is read from where are worked out here, by the formulas of inside/record.py.
const data = JSON.parse(document.getElementById("data").textContent);
const T = data.tokens.length, $ = id => document.getElementById(id);
const make = (name, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
};

// ------------------------------------------------------------------------------------------------------------ the layers

function decoded(text, Kind) {
  return new Kind(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
}

class Layer {
  constructor(raw) {
    Object.assign(this, raw);
    if (this.kind === "memory") this.unpack();
  }

  // theta, phi, rms and q as [T, m], from the rows that a token touches.
  unpack() {
    const m = this.m, k = this.k, at = decoded(this.rows, Uint16Array);
    const packed = Object.fromEntries(["theta", "phi", "rms"].map(name => [name, decoded(this[name], Float32Array)]));
    packed.q = this.q ? decoded(this.q, Float32Array) : packed.phi.map((phi, j) => phi / Math.sqrt(packed.rms[j] ** 2 + this.eps));
    this.start = decoded(this.rms_before, Float32Array);
    for (const name of ["theta", "phi", "rms", "q"]) this[name] = new Float64Array(T * m);
    this.chosen = [];
    for (let t = 0; t < T; t++) {
      for (let i = 0; i < m; i++) this.rms[t * m + i] = t ? this.rms[(t - 1) * m + i] : this.start[i];
      this.chosen.push(Array.from(at.subarray(t * k, t * k + k)));
      for (let j = 0; j < k; j++)
        for (const name of ["theta", "phi", "rms", "q"]) this[name][t * m + at[t * k + j]] = packed[name][t * k + j];
    }
    this.halfLife = Array.from({length: m}, (_, i) => {
      let sum = 0;
      for (let t = 0; t < T; t++) sum += Math.log1p(-Math.min(this.theta[t * m + i], 1 - 1e-12));
      return sum < -0.001 ? -Math.log(2) * T / sum : Infinity;     // else it hardly moves
    });
  }

  // What row i holds after token t: the weight of each token so far, and that of the row before the text.
  contents(t, i) {
    const held = new Float64Array(T), m = this.m;
    let keep = 1;
    for (let s = t; s >= 0; s--) {
      held[s] = this.theta[s * m + i] * keep;
      keep *= 1 - this.theta[s * m + i];
    }
    return {held, before: keep};
  }

  // A, the weight of token s in the read of token t, as [T, T], and that of the state before the text, [T].
  weights() {
    if (this.A) return this;
    this.A = new Float64Array(T * T);
    this.before = new Float64Array(T);
    if (this.kind !== "memory") {
      const packed = decoded(this.weight, Float32Array);
      for (let t = 0, n = 0; t < T; t++) for (let s = 0; s <= t; s++) this.A[t * T + s] = packed[n++];
      this.before.set(decoded(this.weight_before, Float32Array));
      return this;
    }
    const m = this.m, held = Array.from({length: m}, () => new Float64Array(T)), kept = new Float64Array(m).fill(1);
    for (let t = 0; t < T; t++) {
      for (const i of this.chosen[t]) {
        const theta = this.theta[t * m + i], q = this.q[t * m + i], row = held[i];
        for (let s = 0; s < t; s++) row[s] *= 1 - theta;
        row[t] = theta;
        kept[i] *= 1 - theta;
        for (let s = 0; s <= t; s++) this.A[t * T + s] += q * row[s];
        this.before[t] += q * kept[i];
      }
    }
    return this;
  }

  // The same, divided by the sum of their absolute values: shares of the read.
  shares() {
    if (this.share) return this;
    this.weights();
    this.share = new Float64Array(T * T);
    this.shareBefore = new Float64Array(T);
    for (let t = 0; t < T; t++) {
      let total = this.before[t];
      for (let s = 0; s <= t; s++) total += Math.abs(this.A[t * T + s]);
      total = Math.max(total, 1e-30);
      for (let s = 0; s <= t; s++) this.share[t * T + s] = this.A[t * T + s] / total;
      this.shareBefore[t] = this.before[t] / total;
    }
    return this;
  }
}

// The mean of the layers' shares, in a layer's place.
class AllLayers {
  constructor(layers) {
    this.kind = "all";
    this.layers = layers;
  }

  shares() {
    if (this.share) return this;
    this.share = new Float64Array(T * T);
    this.shareBefore = new Float64Array(T);
    for (const layer of this.layers) {
      layer.shares().share.forEach((v, at) => { this.share[at] += v / this.layers.length; });
      layer.shareBefore.forEach((v, t) => { this.shareBefore[t] += v / this.layers.length; });
    }
    return this;
  }
}

const layers = data.layers.map(raw => new Layer(raw)), all = new AllLayers(layers);
const view = {t: Math.min(data.show ?? T - 1, T - 1), layer: 0, heat: "theta"};
const current = () => view.layer === null ? all : layers[view.layer];
const memory = layers.some(layer => layer.kind === "memory");

// ------------------------------------------------------------------------------------------------- words, colours, numbers

const word = id => data.words[id] ?? "";
const shown = id => word(id).replaceAll("\n", "⏎").replaceAll(" ", "␣") || "(nothing)";
const percent = v => `${(100 * v).toFixed(Math.abs(v) < 0.0995 ? 1 : 0)} %`;
const number = v => !isFinite(v) ? "∞" : v && Math.abs(v) < 0.001 ? v.toExponential(1) : v >= 100 ? Math.round(v).toLocaleString("en") : v.toPrecision(3);
const shade = v => Math.sqrt(Math.min(Math.abs(v), 1));      // so that a share of 1 % can be seen
const rowName = (layer, i) => layer.shared && i === layer.m - 1 ? "shared" : String(i);
const name = t => `${t + 1}: ${shown(data.tokens[t])}`;
const style = property => getComputedStyle(document.documentElement).getPropertyValue(property).trim();
const rgb = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));

// A [height, width] array as a picture: 0 is the panel's colour, 1 the hue's, -1 the other hue's.
function paint(canvas, width, height, value, hue = "--one") {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), picture = context.createImageData(width, height);
  const ground = rgb(style("--panel")), up = rgb(style(hue)), down = rgb(style("--two"));
  for (let y = 0, at = 0; y < height; y++)
    for (let x = 0; x < width; x++, at += 4) {
      const v = value(y, x), to = v < 0 ? down : up, amount = shade(v);
      for (let c = 0; c < 3; c++) picture.data[at + c] = ground[c] + amount * (to[c] - ground[c]);
      picture.data[at + 3] = 255;
    }
  context.putImageData(picture, 0, 0);
}

function bar(value, text, most = 1) {
  const length = make("b", {className: value < 0 ? "two" : ""});
  length.style.width = `${100 * Math.min(Math.abs(value) / most, 1)}%`;
  length.hidden = Math.abs(value) < 0.0005 * most;
  return make("td", {className: "bar"}, make("div", {}, length, text));
}

function cell(text, className = "") {
  return make("td", {className, title: text}, className === "n" ? text : make("code", {}, text));
}

function fill(body, rows, length, columns) {             // always the same number of rows, so that nothing moves
  while (rows.length < length) rows.push(make("tr", {}, ...Array.from({length: columns}, () => make("td", {}, "\u00a0"))));
  body.replaceChildren(...rows);
}

// ------------------------------------------------------------------------------------------------------------- the panels

function showText() {
  const {share, shareBefore} = current().shares();
  $("text").childNodes.forEach((span, s) => {
    const value = s <= view.t ? share[view.t * T + s] : 0;
    span.style.setProperty("--shade", shade(value).toFixed(4));
    span.style.setProperty("--hue", value < 0 ? "var(--two)" : "var(--one)");
    span.dataset.share = value;
    span.className = (s > view.t ? "after" : "") + (s >= data.made ? " made" : "");
    span.ariaSelected = String(s === view.t);
    span.title = s <= view.t ? `${name(s)} has ${percent(value)} of the read` : name(s);
  });
  $("text").dataset.before = shareBefore[view.t];
  $("text").setAttribute("aria-activedescendant", `token-${view.t}`);
  const chosen = $(`token-${view.t}`), box = $("text");
  const top = chosen.offsetTop;              // scrolled by hand: scrollIntoView would move the page too
  if (top < box.scrollTop || top + 30 > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
}

function showReads() {
  const layer = current(), {share, shareBefore} = layer.shares(), t = view.t;
  const A = layer === all ? null : layer.A, before = layer === all ? null : layer.before;
  const order = Array.from({length: t + 1}, (_, s) => s).sort((a, b) => Math.abs(share[t * T + b]) - Math.abs(share[t * T + a]));
  const rows = order.slice(0, 10).map(s => make("tr", {}, cell(shown(data.tokens[s])), cell(String(t - s), "n"),
    cell(A ? number(A[t * T + s]) : "–", "n"), bar(share[t * T + s], percent(share[t * T + s]))));
  fill($("reads-body"), rows, 10, 4);
  $("reads-body").append(make("tr", {}, cell(data.state ? "state before" : "empty start"), cell("–", "n"),
    cell(before ? number(before[t]) : "–", "n"), bar(shareBefore[t], percent(shareBefore[t]))));
  const rest = 1 - shareBefore[t] - order.slice(0, 10).reduce((sum, s) => sum + Math.abs(share[t * T + s]), 0);
  $("reads-note").textContent = `Token ${name(t)}, ${layer === all ? "mean of all layers" : `layer ${view.layer + 1}`}: the ten ` +
    `largest weights; ${percent(Math.max(rest, 0))} comes from all other tokens.` +
    (layer.kind === "mamba2" ? " Mean of the heads; weights can be negative (orange)." : layer.kind === "attention" ? " Mean of the heads." : "");
}

function showNext() {
  const top = data.top[view.t], next = data.tokens[view.t + 1];
  fill($("next-body"), top.map(([id, p]) => {
    const row = make("tr", {}, cell((id === next ? "✓ " : "") + shown(id)), bar(p, percent(p)));
    if (id === next) row.style.fontWeight = 600;
    return row;
  }), 8, 2);
  const loss = data.loss[view.t + 1];
  $("next-note").textContent = next === undefined ? "The text ends here. The eight likeliest tokens:" :
    `Then comes ${shown(next)}: ${loss.toFixed(2)} nats, a probability of ${percent(Math.exp(-loss))}. The eight likeliest tokens:`;
}

function showWrites() {
  const layer = current(), t = view.t, rates = layer.kind === "memory";
  $("bars").hidden = !rates;
  $("layer-box").hidden = rates;
  $("bars-at").textContent = $("rates").textContent = "";
  if (!rates) {
    const rows = (layer === all ? layers : [layer]).map(one => {
      const share = one.shares().share, best = Array.from({length: t + 1}, (_, s) => s).reduce(
        (a, s) => Math.abs(share[t * T + s]) > Math.abs(share[t * T + a]) ? s : a, t);
      const [eta, mu, entropy] = one.kind === "memory" ? [one.eta[t], one.mu[t], one.entropy[t]].map(v => v.toFixed(2)) : "–––";
      const row = make("tr", {}, cell(`${layers.indexOf(one) + 1}, ${one.kind}`), cell(eta, "n"), cell(mu, "n"), cell(entropy, "n"),
        cell(name(best)), bar(share[t * T + best], percent(share[t * T + best])));
      return row;
    });
    fill($("layer-body"), rows, 1, 6);
    $("writes-note").textContent = layer === all ? `Token ${name(t)} in every layer. Choose a layer to see its rows.` :
      "This layer has no rows: it keeps no table of memory that tokens are routed to.";
    return;
  }
  const {m} = layer, theta = layer.theta.subarray(t * m, t * m + m), phi = layer.phi.subarray(t * m, t * m + m);
  const most = [theta, phi].map(values => Math.max(...values, 1e-9)), svg = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(svg, "svg");
  picture.setAttribute("viewBox", `0 -1 ${m} 2`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", `theta and phi of ${m} rows`);
  const add = (kind, properties) => {
    const element = document.createElementNS(svg, kind);
    for (const [key, value] of Object.entries(properties)) element.setAttribute(key, value);
    picture.append(element);
  };
  for (let i = 0; i < m; i++) {
    const up = theta[i] / most[0], down = phi[i] / most[1];
    add("rect", {class: "theta", x: i + .12, width: .76, y: -up, height: up});
    add("rect", {class: "phi", x: i + .12, width: .76, y: 0, height: down});
  }
  add("line", {x1: 0, x2: m, y1: 0, y2: 0});
  picture.onmousemove = event => {
    const box = picture.getBoundingClientRect(), i = Math.min(Math.floor(m * (event.clientX - box.x) / box.width), m - 1);
    $("bars-at").textContent = `row ${rowName(layer, i)}: writes θ = ${number(theta[i])}, reads φ = ${number(phi[i])}`;
  };
  $("bars").replaceChildren(picture);
  $("bars-at").textContent = `Rows 0 to ${m - 1} from left to right${layer.shared ? ", the last for all tokens" : ""}. Longest bars: θ = ${number(most[0])}, φ = ${number(most[1])}.`;
  $("rates").replaceChildren(...[`update rate η = ${layer.eta[t].toFixed(3)}`, `merge rate μ = ${layer.mu[t].toFixed(3)}`,
    `entropy of the affinity ${layer.entropy[t].toFixed(2)} of ${Math.log(m - layer.shared).toFixed(2)} nats`].map(text => make("span", {}, text)));
  $("writes-note").textContent = `Token ${name(t)}. θ (blue, up): the share of a row that it overwrites. φ (orange, down): the weight that it ` +
    "reads the row with. Each on its own scale.";
}

function showRows() {
  const layer = current(), t = view.t;
  $("rows-scroll").classList.toggle("away", layer.kind !== "memory");
  if (layer.kind !== "memory") {
    $("rows-note").textContent = layer === all ? "Choose a layer to see its rows." : "This layer has no rows.";
    return;
  }
  const {m} = layer, body = $("rows-body");
  if (body.childNodes.length !== m || body.dataset.layer !== String(view.layer)) {
    body.dataset.layer = view.layer;
    body.replaceChildren(...Array.from({length: m}, (_, i) => make("tr", {}, cell(rowName(layer, i), "n"),
      make("td", {className: "share"}, make("canvas")), cell(""), cell("", "n"), cell("", "n"), cell("", "n"), cell("", "n"))));
  }
  for (let i = 0; i < m; i++) {
    const {held, before} = layer.contents(t, i), tr = body.childNodes[i], cells = tr.childNodes;
    let total = 0, age = 0;
    for (let s = 0; s <= t; s++) {
      total += held[s];
      age += held[s] * (t - s);
    }
    const order = Array.from({length: t + 1}, (_, s) => s).filter(s => held[s] >= 0.0005).sort((a, b) => held[b] - held[a]).slice(0, 3);
    paint(cells[1].firstChild, T, 1, (_, s) => held[s]);
    cells[2].firstChild.textContent = order.map(s => `${shown(data.tokens[s])} ${percent(held[s])}`).join("  ") || "nothing of this text";
    cells[2].title = cells[2].firstChild.textContent;
    [percent(before).slice(0, -2), number(layer.rms[t * m + i]), total > 1e-9 ? (age / total).toFixed(1) : "–",
     isFinite(layer.halfLife[i]) ? number(layer.halfLife[i]) : "–"].forEach((text, j) => { cells[3 + j].textContent = text; });
    tr.className = (isFinite(layer.halfLife[i]) ? "" : "still") + (layer.chosen[t].includes(i) && layer.theta[t * m + i] > 0 ? " chosen" : "");
  }
  $("rows-note").textContent = `After token ${name(t)}, layer ${view.layer + 1}.`;
}

// --------------------------------------------------------------------------------------------------------------- the maps

function stage(id, onhover) {
  const place = $(id), canvas = make("canvas", {role: "img", ariaLabel: $(id).dataset.label}), mark = make("u"), line = make("u", {className: "line"});
  place.append(canvas, mark);
  if (id === "read-map") place.append(line);
  const at = event => {
    const box = place.getBoundingClientRect();
    return [(event.clientX - box.x) / box.width, (event.clientY - box.y) / box.height].map(v => Math.max(0, Math.min(v, 1 - 1e-9)));
  };
  place.onmousemove = event => onhover(...at(event));
  place.onmouseleave = () => onhover(null);
  place.onclick = event => choose(Math.floor(at(event)[id === "read-map" ? 1 : 0] * T));
  return {canvas, mark: () => {
    mark.style.left = `${100 * view.t / T}%`;
    mark.style.width = `${100 / T}%`;
    line.style.top = `${100 * view.t / T}%`;
    line.style.height = `${100 / T}%`;
  }};
}

const heatLayers = () => (current() === all ? layers : [current()]).filter(layer => layer.kind === "memory");
const maps = {
  loss: stage("loss-map", x => {
    const t = Math.floor(x * T);
    $("heat-at").textContent = x === null ? "" : `${name(t)}: ${data.loss[t] === null ? "not predicted" : `loss ${data.loss[t].toFixed(2)} nats`}`;
  }),
  heat: stage("heat-map", (x, y) => {
    const shownLayers = heatLayers(), t = Math.floor(x * T);
    if (x === null || !shownLayers.length) return void ($("heat-at").textContent = "");
    const row = Math.floor(y * shownLayers.reduce((sum, layer) => sum + layer.m, 0)), layer = shownLayers[Math.floor(row / shownLayers[0].m)];
    const i = row % shownLayers[0].m;
    $("heat-at").textContent = `layer ${layers.indexOf(layer) + 1}, row ${rowName(layer, i)}, token ${name(t)}: θ = ${number(layer.theta[t * layer.m + i])}, φ = ${number(layer.phi[t * layer.m + i])}`;
  }),
  read: stage("read-map", (x, y) => {
    const s = Math.floor(x * T), t = Math.floor(y * T);
    $("read-at").textContent = x === null ? "" : s > t ? `token ${t + 1} does not see token ${s + 1}, which comes later` :
      `token ${name(t)} takes ${percent(current().shares().share[t * T + s])} of its read from token ${name(s)}`;
  }),
};

function showMaps() {
  const {share} = current().shares(), rows = heatLayers(), most = Math.max(...data.loss);
  paint(maps.loss.canvas, T, 1, (_, t) => (data.loss[t] / most) ** 2, "--two");
  $("loss-most").textContent = most.toFixed(1);
  paint(maps.read.canvas, T, T, (t, s) => s <= t ? share[t * T + s] : 0);
  $("heat-choice").hidden = $("heat-map").hidden = !rows.length;
  if (rows.length) {
    const m = rows[0].m, hue = view.heat === "theta" ? "--one" : "--two";
    paint(maps.heat.canvas, T, m * rows.length, (y, t) => rows[Math.floor(y / m)][view.heat][t * m + y % m], hue);
    $("heat-choice").childNodes.forEach(button => { button.ariaPressed = String(button.value === view.heat); });
  }
  $("heat-note").replaceChildren(rows.length ? `Rows ↓ ${rows.length > 1 ? `of layers 1 to ${layers.length} ` : ""}by tokens →, ` : "This layer has no rows.",
    ...rows.length ? [make("span", {className: view.heat === "theta" ? "ramp" : "ramp two"}), " 0 to 1"] : []);
}

// ------------------------------------------------------------------------------------------------------------ the choice

function show(everything) {
  showText();
  showReads();
  showNext();
  showWrites();
  showRows();
  if (everything) showMaps();
  for (const map of Object.values(maps)) map.mark();
}

function choose(t) {
  view.t = Math.max(0, Math.min(t, T - 1));
  show(false);
}

function chooseLayer(layer) {
  view.layer = layer;
  for (const tab of $("layers").children) {
    tab.ariaSelected = String(tab.value === String(layer));
    tab.tabIndex = tab.value === String(layer) ? 0 : -1;
  }
  show(true);
}

function lineAway(direction) {                           // the token nearest to the chosen one in the line above or below
  const here = $(`token-${view.t}`).getClientRects()[0];
  let best = null, distance = Infinity;
  $("text").childNodes.forEach((span, s) => {
    const box = span.getClientRects()[0], down = (box.top - here.top) * direction;
    if (down > 8 && down * 100 + Math.abs(box.left - here.left) < distance) {
      distance = down * 100 + Math.abs(box.left - here.left);
      best = s;
    }
  });
  return best ?? view.t;
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inRows = document.activeElement === $("rows-scroll"), onTab = document.activeElement?.role === "tab";
  const move = {ArrowLeft: () => view.t - 1, ArrowRight: () => view.t + 1, ArrowUp: () => lineAway(-1), ArrowDown: () => lineAway(1),
                Home: () => 0, End: () => T - 1}[event.key];
  if (onTab && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
    const tabs = [...$("layers").children], at = tabs.indexOf(document.activeElement) + (event.key === "ArrowRight" ? 1 : -1);
    const tab = tabs[(at + tabs.length) % tabs.length];
    tab.click();
    tab.focus();
  } else if (move && !(inRows && !["ArrowLeft", "ArrowRight"].includes(event.key))) {
    choose(move());
  } else if (event.key === "0" && layers.length > 1) {
    chooseLayer(null);
  } else if (/^[1-9]$/.test(event.key) && layers[event.key - 1]) {
    chooseLayer(event.key - 1);
  } else {
    return;
  }
  event.preventDefault();
});

$("about").textContent = data.about;
$("text-note").textContent = `${T} tokens. Choose one: the tokens before it are shaded by their exact weight in what the layer reads there.` +
  (data.made < T ? " Dotted: written by the model." : "") + (data.conv ? ` A token's input holds its last ${data.conv} tokens (convolution).` : "");
$("how").textContent = memory ? "After token t, row i is a mean of the inputs so far: token s has the weight θ_s[i] ∏ (1 − θ_u[i]) over s < u ≤ t, " +
  "exactly, since the recurrence is linear; what is left is the row's start. The read adds up the rows, each with φ and brought to unit rms. " +
  "So each earlier token has a known weight in it: A[t, s] = Σ_i φ_t[i] / rms(h_t[i]) · θ_s[i] ∏ (1 − θ_u[i]). Colours grow with the square root of a share." :
  "Colours grow with the square root of a share.";
$("signs").replaceChildren(...layers.some(layer => layer.kind === "mamba2") ? [make("span", {className: "ramp two"}), " negative"] : []);
data.tokens.forEach((id, t) => {
  const span = make("span", {id: `token-${t}`, role: "option", onclick: () => choose(t)});
  const parts = word(id).split("\n");
  parts.forEach((part, i) => span.append(...i ? [make("i", {}, "⏎"), "\n", part] : [part]));
  if (!word(id)) span.append(make("i", {}, "∅"));
  $("text").append(span);
});
for (const [layer, text] of [...layers.map((_, i) => [i, `Layer ${i + 1}`]), ...layers.length > 1 ? [[null, "All layers"]] : []])
  $("layers").append(make("button", {value: String(layer), role: "tab", textContent: text, onclick: () => chooseLayer(layer)}));
for (const [kind, text] of [["theta", "θ written"], ["phi", "φ read"]])
  $("heat-choice").append(make("button", {value: kind, textContent: text, onclick: () => { view.heat = kind; showMaps(); }}));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(true));
document.documentElement.style.setProperty("--layers", layers.length);
$("rows").hidden = !memory;
chooseLayer(data.layer ?? 0);
