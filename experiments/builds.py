"""kernel.py compiled for GPUs that need not be here, and what the machine code is made of: python -m experiments.builds

Prints, for bf16, m 64 and d 1024 on sm_90 (or --capability N), of each kernel: registers of a program, bytes spilled, shared
memory, and how many instructions its code has, of them shuffles between threads, barriers, tensor core products, accesses to
memory and to shared memory. And how many instructions a warp executes in a chunk, by how often each loop is run (`executed`).
"""
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from data.messages import one_line
from experiments.command import parser, save

KINDS = {"shuffles": "SHFL", "barriers": "BAR", "products": "HGMMA|HMMA|WGMMA", "memory": "LDG|STG|LDGSTS",
         "in shared": "LDS|STS|LDSM"}
SERIAL = "mix", "mix_back", "rows", "theta"     # the kernels that go token by token
COLUMNS = "kernel", "warps", "registers", "spilled", "shared", "all", "executed", *KINDS


def tool(name):
    """One of NVIDIA's programs that come with Triton."""
    import triton
    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def build(capability, dtype, m, d, generation=True):
    """Compile every kernel for a shape, those of fast/decode_gpu.py if generation: yields ({"kernel", "registers", "spilled",
    "shared", ...}, file of the machine code). Needs TRITON_INTERPRET unset, a folder TRITON_CACHE_DIR, and no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    import kernel
    from fast import decode_gpu, step_gpu
    name = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    low = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    types = {**dict.fromkeys("write w1 w2 wF qF A A1 A2 states states1 states2".split(), low),
             **dict.fromkeys("x v v1 v2 out y".split(), name[dtype]), **dict.fromkeys("TN", "i32"),
             **dict.fromkeys(("eps", "tau"), "fp32"), "rows": "*i64"}
    # of add_norm and silu_mul
    wide = {"x": "*fp32", "y": name[dtype], "low": name[dtype], "both": name[dtype]}
    step = dict(m=m, d=d, k=m // 4, DENSE=False, **step_gpu.step_tiles(1, m // 4, d))
    BM, BD = triton.next_power_of_2(m), triton.next_power_of_2(d)
    others = {"step": (step_gpu.step_kernel, step)}
    if generation:
        route = dict(m=m, d=d, k=max(m // 4, 1), BM=BM, **step_gpu.step_tiles(1, m, d))
        others |= {"add_norm": (decode_gpu.add_norm_kernel, dict(d=d, BD=BD, ADD=True, LOW=dtype != torch.float32, num_warps=4)),
                   "silu_mul": (decode_gpu.silu_mul_kernel, dict(n=d, BLOCK=1024, num_warps=4)),
                   "route_step": (decode_gpu.route_step_kernel, route)}
    for label, (function, options) in {**kernel.launches(m, d, dtype), **others}.items():
        launch = {k: options[k] for k in ("num_warps", "num_stages") if k in options}
        constants = {k: v for k, v in options.items() if k not in launch}
        known = {**types, **wide} if label in ("add_norm", "silu_mul") else types
        signature = {n: "constexpr" if n in constants else known.get(n, "*fp32") for n in function.arg_names}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source_of(function, signature, constants), target=target, options=launch)
        binary = Path(os.environ["TRITON_CACHE_DIR"], f"{capability}.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        done = subprocess.run([tool("cuobjdump"), "-res-usage", binary], capture_output=True, text=True, check=True)
        use = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
        yield {"capability": capability, "kernel": label, "dtype": str(dtype), "m": m, "d": d, "warps": launch["num_warps"],
               "registers": use["REG"] * 32 * launch["num_warps"], "spilled": use["STACK"] + use["LOCAL"],
               "shared": compiled.metadata.shared}, binary


def source_of(function, signature, constants):
    """What triton.compile takes, for pointers that are multiples of 16 bytes. Triton 3.2 asks for it in another way."""
    from triton.compiler import ASTSource
    try:
        from triton.backends.compiler import AttrsDescriptor
    except ImportError:
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(function.arg_names) if signature[n].startswith("*")}
        return ASTSource(function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()}, aligned)
    aligned = {i: 16 for i, n in enumerate(function.arg_names) if signature[n].startswith("*")}
    variable = {n: t for n, t in signature.items() if n not in constants}
    return ASTSource(function, variable, constants, AttrsDescriptor.from_hints(aligned))


def instructions(binary, C):
    """{kind: number in the machine code}, "all" included, and "executed"; {} where NVIDIA's disassembler is missing."""
    if not tool("nvdisasm").exists():
        return {}
    code = subprocess.run([tool("nvdisasm"), "-c", binary], capture_output=True, text=True, check=True).stdout
    found, labels, loops = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif op := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            if op[1] == "BRA" and target and target[1] in labels:          # backwards
                loops.append(range(labels[target[1]], len(found) + 1))
            found.append(op[1])
    loops = [loop for loop in loops if len(loop) > 1]                       # the end of a program branches to itself
    counts = {kind: sum(bool(re.fullmatch(names, op)) for op in found) for kind, names in KINDS.items()}
    return {"all": len(found), "executed": executed(found, loops, C), **counts}


def executed(found, loops, C):
    """How many instructions a warp of a kernel that goes token by token executes in a chunk of C tokens, from its operations and
    the ranges of its loops. A loop with loops in it is over the C / 16 sub-chunks; one in it with products is over the
    sub-chunks before, half of them on average, one without over 16 tokens. One outside is over all tokens, several at once if
    it stores several times; its like that does what is left over is not run. One that stores nothing is over the chunks behind,
    16 at a time: 2.5 times on average if there are 64."""
    def times(loop):
        ops, outer = found[loop.start:loop.stop], any(loop[0] in other and other != loop for other in loops)
        if any(other[0] in loop and other != loop for other in loops):
            return C / 16
        if outer:
            return (C / 16 - 1) / 2 if any(re.fullmatch(KINDS["products"], op) for op in ops) else 16
        stores = sum(op == "STG" for op in ops)
        return C / stores if stores > 1 else 0 if stores else 2.5
    return round(sum(math.prod(times(loop) for loop in loops if i in loop) for i in range(len(found))))


def main(argv=None):
    p = parser("builds", "What the kernels are compiled to.")
    p.add_argument("--capability", type=int, default=90, help="of the GPU: 80, 89, 90, 100, 120 (default: 90)")
    p.add_argument("--m", type=int, default=64)
    p.add_argument("--d", type=int, default=1024)
    p.add_argument("--json", metavar="FILE", type=Path, help="write the rows")
    a = p.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)
        try:
            import kernel
            for row, binary in build(a.capability, torch.bfloat16, a.m, a.d):
                t = kernel.tiles(a.m, a.d, torch.bfloat16)
                found = instructions(binary, t["C"])
                if row["kernel"] in SERIAL:
                    found |= {"C": t["C"], "rows": t["BR"]}
                else:
                    found.pop("executed", None)
                rows.append({**row, **found})
                for words in ([COLUMNS] if len(rows) == 1 else []) + [[rows[-1].get(column, "") for column in COLUMNS]]:
                    print("  ".join(f"{word!s:>11}" for word in words), flush=True)
        except (ImportError, OSError, subprocess.CalledProcessError, ValueError) as e:
            sys.exit(f"experiments.builds: error: {one_line(e)}")
    save("builds", a.json, rows)


if __name__ == "__main__":
    main()
