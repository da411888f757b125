"""The guard's compressions, run and hashed: `python -m tests.guard.record` keeps the hashes.

Rows run in a process of their own with fixed settings, so that who asks does not change a bit. Only
public verbs are called: modules may move. Bits depend on the machine too, so hashes are kept by
`describe_environment`. Run this at a commit that is trusted; it adds what is missing for the
machine it runs on and replaces nothing. What is allowed to change (`test_guard.ALLOWED`) is kept
beside it: `python -m tests.guard.record --allowed "tiny rtn/report.json"`.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
HASHES = Path(__file__).with_name("hashes.json")
# Whose code decides bits; LAPACK is scipy's.
PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "optax")
DEVICES = 4  # as in tests/conftest.py
SETTINGS = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
DROPPED = ("JAX_", "XLA_", "OPENBLAS_", "OMP_", "MKL_")

RTN = "rtn(bits=2, group_size=32)"
SHORT = "updates=8, batch=4, eval_every=4"
RECIPES = {
    "rtn": RTN,
    "gptq_rilq": f"gptq(bits=2, group_size=32) | rilq(rank=4, {SHORT})",
    "apiq_block": "apiq(bits=2, group_size=32, rank=4, epochs=1)",
    "apiq_linear": "apiq(bits=2, group_size=32, rank=4, scope='linear', updates=8)",
    "omniquant": "omniquant(bits=2, group_size=32, epochs=1)",
    "efficient_qat": f"block_ap(bits=2, group_size=32, epochs=1) | e2e_qp({SHORT})",
    "lrec": f"{RTN} | lrec(rank=4, {SHORT})",
    "lrec_top_k": f"{RTN} | lrec(rank=4, logits='top_k', top_k=8, leave_out=('mlp/down',), "
    f"{SHORT})",
    "pool_merge": f"{RTN} | rilq(rank=2, pool=True, {SHORT}) | merge",
    "rilq_block": f"{RTN} | rilq(rank=4, scope='block', {SHORT})",
    "rilq_linear": f"{RTN} | rilq(rank=4, scope='linear', {SHORT})",
    "slim": f"slim_quant | wanda | slim_lora | quantize_adapter | finetune({SHORT})",
    "finetune_scales": f"{RTN} | finetune(train='scales', {SHORT})",
    "e8p": "hadamard | e8p(passes=2)",
    "caldera": "caldera(quantizer=gptq(bits=2, group_size=32), rank=4, factor_bits=4, "
    "factor_group_size=32, iters=2, inner=2)",
    "squeezellm": "squeezellm(bits=2)",
    "tuned": f"{RTN} | svd(rank=2)",
}
# Artifacts that `lqec finetune` goes on with, and its settings.
TUNED = {"tuned": {"updates": 8, "batch": 4, "eval_every": 4, "seqlen": 32}}
ROWS = tuple(f"{section} {name}" for section in ("tiny", "demo") for name in RECIPES)

EXAMPLES = [{"prompt": "one plus one is", "completion": "two"},
            {"prompt": "one plus two is", "completion": "three"},
            {"text": "one two three one two three"}] * 8  # fmt: skip
# Fields of report.json that are measured anew each time.
MEASURED = {"seconds", "peak_rss_mb"}
# Fields of lqec.json that say what the other files and fields are: these are hashed themselves.
NOT_HASHED = ("digests", "made")


class Text(NamedTuple):
    """A dense model, the text it is compressed with, and how that is cut."""

    model: Any
    calib: Any
    seqlen: int
    windows: int = 12


def describe_environment() -> str:
    """Names what bits depend on: packages, the processor and its instructions, its cores."""
    packages = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([*packages, _describe_processor(), f"{cores} cores", "compiled quickly"])


def _describe_processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return f"{platform.system()} {platform.machine()} {platform.processor()}"
    facts = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE))
    flags = facts.get("flags", facts.get("Features", "")).split()
    # Those by which a compiler or a library chooses code.
    chosen = sorted(f for f in flags if re.match(r"s?sse|avx|amx|fma|f16c|bmi|asimd|sve", f))
    named = [facts[name] for name in ("vendor_id", "cpu family", "model") if name in facts]
    digest = hashlib.sha256(" ".join(chosen).encode()).hexdigest()[:12]
    widest = [name for name in ("avx2", "avx512f", "amx_tile") if name in chosen][-1:]
    return " ".join([platform.machine(), *named, *widest, digest])


class Runner:
    """A process that runs rows, one after another, so that they share what is compiled."""

    def __init__(self, folder: Path, cache: Path | None = None):
        kept = {n: v for n, v in os.environ.items() if not n.startswith(DROPPED)}
        paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
        programs = {} if cache is None else {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.guard.record", "--serve", str(folder)]
        self._errors = (folder / "stderr.txt").open("w+")
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=kept | SETTINGS | paths | programs, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip

    def run(self, row: str) -> dict[str, str]:
        """Returns the hashes of what a row wrote, by file.

        Raises:
          RuntimeError: the row failed, with the end of what its process said.
        """
        self._process.stdin.write(row + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer or "failed" in (hashes := json.loads(answer)):
            self._errors.seek(0)
            raise RuntimeError(f"{row}: {self._errors.read()[-3000:]}")
        return hashes

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()


def serve(folder: Path) -> None:
    """Answers each row on standard input with its hashes, in JSON."""
    import jax

    from tests.compiling import compile_quickly

    jax.config.update("jax_num_cpu_devices", DEVICES)
    compile_quickly()
    texts = {}
    for line in sys.stdin:
        section, name = line.split()
        try:
            if section not in texts:
                jax.clear_caches()  # programs of other shapes
                texts[section] = {"tiny": make_tiny, "demo": make_demo}[section](folder)
            hashes = hash_artifact(make_artifact(texts[section], folder, section, name))
        except Exception:
            traceback.print_exc()  # the other rows shall still run
            hashes = {"failed": line}
        print(json.dumps(hashes), flush=True)


def make_tiny(folder: Path) -> Text:
    """Writes a Llama of two blocks and a tokenizer of eight words."""
    import tokenizers

    from tests.golden.tiny_checkpoint import make_tokens, write_checkpoint

    path = write_checkpoint(folder / "model", num_hidden_layers=2, hidden_size=64,
                            intermediate_size=128)  # fmt: skip
    words = ["<s>", "</s>", "<unk>", "one", "two", "three", "plus", "is"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(special))
    return Text(path, make_tokens(12), seqlen=32)


def make_demo(folder: Path) -> Text:
    return Text("demo", "demo:calib", seqlen=64)


def make_artifact(text: Text, folder: Path, section: str, name: str) -> Path:
    """Compresses, fine-tunes where the row says so, and returns the artifact's folder."""
    import lqec_jax

    out = folder / f"{section}-{name}"
    lqec_jax.compress(text.model, RECIPES[name], text.calib, seqlen=text.seqlen,
                      windows=text.windows, out=out, overwrite=True)  # fmt: skip
    if name in TUNED:
        rows = folder / "examples.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
        start, out = out, folder / f"{out.name}-again"
        lqec_jax.finetune(start, rows, out=out, overwrite=True, **TUNED[name])
    return out


def hash_artifact(folder: Path) -> dict[str, str]:
    """Returns sha256 by file: of weights as they are, of records without what each run measures."""
    tensors = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    meta = json.loads((folder / "lqec.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    for name in NOT_HASHED:
        meta.pop(name, None)
    meta["versions"] = report["environment"]["versions"] = None
    report["environment"] = sorted(report["environment"])
    written = tensors | {
        "lqec.json": _spell(meta),
        "report.json": _spell(drop_measured(report)),
        "names of files": _spell(sorted(path.name for path in folder.iterdir())),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in written.items()}


def drop_measured(value: Any) -> Any:
    """Keeps the names of fields that are measured anew each time, and not their numbers."""
    if isinstance(value, Mapping):
        return {n: None if n in MEASURED else drop_measured(v) for n, v in value.items()}
    return [drop_measured(v) for v in value] if isinstance(value, list) else value


def _spell(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def spell_steps() -> dict[str, str]:
    """Returns every method's step, and that of every preset, with all defaults written out."""
    import inspect

    from lqec_jax.methods import METHODS, find_factory
    from lqec_jax.recipe import parse_recipe

    texts = []
    for name in METHODS:
        presets = {"finetune": "slim"}.get(name, "paper")
        given = "preset" in inspect.signature(find_factory(name)).parameters
        texts += [f"{name}()"] + [f"{name}(preset={presets!r})"] * given
    return {text: str(parse_recipe(text)) for text in texts}


def read_hashes() -> dict[str, Any]:
    """Returns `steps`, and by environment `runs` and what is `allowed` to differ from them."""
    return json.loads(HASHES.read_text()) if HASHES.is_file() else {}


def add_hashes(runner: Runner, rows: Iterable[str], allowed: Iterable[str]) -> None:
    """Runs what is not recorded for this machine, or is allowed to change, and keeps it."""
    kept, here = read_hashes(), describe_environment()
    kept["steps"] = spell_steps() | kept.get("steps", {})
    _write(kept)
    runs = kept.setdefault("runs", {}).setdefault(here, {})
    changed = kept.setdefault("allowed", {}).setdefault(here, {})
    for row in rows:
        if row not in runs:
            runs[row] = runner.run(row)
            _write(kept)
    for place in allowed:
        row, _, file = place.partition("/")
        changed[place] = runner.run(row)[file]
        _write(kept)


def _write(kept: Mapping[str, Any]) -> None:
    HASHES.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def main(words: list[str]) -> None:
    if words[:1] == ["--serve"]:
        serve(Path(words[1]))
        return
    allowed = words[1:] if words[:1] == ["--allowed"] else []
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        try:
            add_hashes(runner, [] if allowed else words or ROWS, allowed)
        finally:
            runner.close()


if __name__ == "__main__":
    main(sys.argv[1:])
