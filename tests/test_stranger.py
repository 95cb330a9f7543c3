"""A stranger's machine: no network, no compiler, no rights, a small disk."""
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT, SOURCES, some_text


def without_rights():
    """For the child process: root without the capabilities that make it root to the file system; for others nothing."""
    import ctypes
    for capability in (1, 2, 3):                        # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)            # PR_CAPBSET_DROP


@pytest.fixture
def stranger(tmp_path):
    """Runs a program of a checkout that cannot be written to, with no network, compiler, home folder, Triton, matplotlib or
    pyarrow, in a folder of its own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("takes rights away as Linux does")
    checkout, here, site = tmp_path / "checkout", tmp_path / "here", tmp_path / "site"
    for folder in (checkout, here, site, tmp_path / "bin"):
        folder.mkdir()
    for path in [*SOURCES, *ROOT.glob("inside/page.*")]:
        (checkout / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, checkout / path.relative_to(ROOT))
    (site / "sitecustomize.py").write_text("""
import socket, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "matplotlib", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
def connect(self, *address):
    raise OSError("Network is unreachable")
socket.socket.connect = connect
""")
    for path in [checkout, *checkout.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def run(program, *arguments):
        env = {"PATH": str(tmp_path / "bin"), "HOME": "/nonexistent", "PYTHONPATH": f"{site}:{checkout}", "OMP_NUM_THREADS": "1"}
        program = [str(checkout / program)] if program.endswith(".py") else ["-m", f"experiments.{program}"]
        command = [sys.executable, *program, *map(str, arguments)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
        return subprocess.Popen(command, cwd=here, env=env, preexec_fn=without_rights, **pipes)
    run.here, run.checkout = here, checkout
    yield run
    for path in [here, checkout, *(p for p in tmp_path.rglob("*") if p.is_dir())]:
        path.chmod(0o755)                               # so that pytest can remove them


def test_on_a_strangers_machine(stranger):
    here = stranger.here
    (here / "mine.txt").write_text(some_text(3000), encoding="utf-8")
    short = ["--data", "d", "--n_layer", 1, "--d_model", 16, "--context", 16, "--batch_size", 2, "--max_steps", 3,
             "--sample_tokens", 2]
    for program, *arguments in (["data/prepare.py", "--input", "mine.txt", "--out", "d", "--vocab_size", 280],
                                ["train.py", *short, "--compile"], ["sample.py", "--max_new_tokens", 3],
                                ["look.py", "--tokens", 20], ["evaluate", "out/best.pt", "--loss", "--json", "e.json"]):
        process = stranger(program, *arguments)
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert program != "train.py" or "compile   no: " in said
    (here / "closed").mkdir()
    (here / "closed").chmod(0o555)
    shutil.copy(here / "out/best.pt", here / "secret.pt")
    (here / "secret.pt").chmod(0)
    shutil.copytree(here / "out", here / "frozen")
    (here / "frozen").chmod(0o555)
    frozen = (here / "frozen/last.pt").read_bytes()
    cases = (
            ["cannot be written to; python data/prepare.py --out DIR", "train.py", "--out", "new"],
            ["Permission denied", "train.py", *short, "--out", "closed/out"],
            ["Permission denied", "train.py", "--resume", "--out", "frozen", "--max_steps", 5],
            ["Permission denied", "sample.py", "--checkpoint", "secret.pt"],
            ["Permission denied", "sample.py", "--prompt", "FILE:secret.pt"],
            ["Permission denied", "sample.py", "--max_new_tokens", 2, "--save-state", "closed/s"],
            ["Permission denied", "look.py", "--tokens", 9, "--out", "closed/look.html"],
            ["Permission denied", "evaluate", "out/best.pt", "--json", "closed/e.json"],
            ["needs matplotlib: pip install", "evaluate", "out/best.pt", "--routing", "--tokens", 100, "--figure", "f.png"],
            ["cannot be written to", "data/prepare.py", "--input", "mine.txt", "--out", "closed/d"],
            ["Permission denied", "data/prepare.py", "--input", "secret.pt", "--out", "e"])
    for some in (cases[i:i + 5] for i in range(0, len(cases), 5)):                  # five at a time
        for (message, program, *arguments), process in [(case, stranger(*case[1:])) for case in some]:
            said, errors = process.communicate(timeout=300)
            assert process.returncode == 1, (program, arguments, said, errors)
            assert re.match(rf"{program}: error: .*{re.escape(message)}", errors.strip().splitlines()[-1]), errors
            assert "Traceback" not in errors, errors
    assert (here / "frozen/last.pt").read_bytes() == frozen


def test_a_small_disk(run20, corpus, tmp_path):
    """A file system of one megabyte, really full: every program that writes ends with one line, and what was there stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "big.txt").write_text(some_text(400_000), encoding="utf-8")
    script = tmp_path / "script.sh"
    run, python, best = tmp_path / "run", sys.executable, run20[0] / "best.pt"
    shutil.copytree(run20[0], run)
    script.write_text(f"""
mount -t tmpfs -o size=1m none {disk} || exit 77
cp {run}/last.pt {run}/best.pt {run}/log.csv {disk}/
sha256sum {disk}/last.pt {disk}/best.pt
head -c 2000000 /dev/zero > {disk}/filler 2> /dev/null
{python} {ROOT}/train.py --out {disk} --resume --max_steps 30; echo code $? >&2
{python} {ROOT}/sample.py --checkpoint {best} --max_new_tokens 3 --save-state {disk}/s > /dev/null; echo code $? >&2
(cd {ROOT}; {python} -m experiments.evaluate {best} --json {disk}/e.json > /dev/null; echo code $? >&2)
rm {disk}/filler
{python} {ROOT}/data/prepare.py --input {tmp_path}/big.txt --out {disk}/d --vocab_size 260 > /dev/null; echo code $? >&2
sha256sum {disk}/last.pt {disk}/best.pt
ls -A {disk}
{python} {ROOT}/train.py --out {disk} --resume --max_steps 22 > /dev/null; echo code $? >&2
""")
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, to mount a file system of its own")
    done = subprocess.run(["unshare", "-rm", "sh", str(script)], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine does not let one mount a file system")
    errors = done.stderr.splitlines()
    programs = [line for line in errors if ": error: " in line]
    assert [line.split(":")[0] for line in programs] == ["train.py", "sample.py", "evaluate", "data/prepare.py"], done.stderr
    assert all("No space left" in line for line in programs), done.stderr
    assert [line for line in errors if line.startswith("code")] == ["code 1"] * 4 + ["code 0"], done.stderr
    sums = re.findall(r"^([0-9a-f]{64})  (.*)", done.stdout, flags=re.M)
    assert sums[:2] == sums[2:] and len(sums) == 4
    assert not re.search(r"^\..*(tmp|part|lock)", done.stdout, flags=re.M), done.stdout
