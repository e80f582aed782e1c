"""Fixtures shared by all tests: tiny random models and a tiny tokenizer built on the spot, and the real small model."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests import builds, gpu
from tests.preloaded import Preloaded

gpu.begin(sys.argv[1:])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CORES = max(1, _ALLOWED // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
"""Of this process, where several run tests beside each other."""
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # threads that wait for cores which others use make everything many times slower
    CORES = min(CORES, int(os.environ.get("OMP_NUM_THREADS", CORES)))
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(CORES)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moacompress.models.source import SourceModel
    from moacompress.rules.plan import Plan

ROOT = Path(__file__).resolve().parent.parent

ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 80},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 80},
    "gemma3_text": {"head_dim": 16, "sliding_window": 80, "layer_types": ALTERNATING},
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "smollm3": {"no_rope_layer_interval": 2},
    "gpt_neox": {"num_key_value_heads": None},
    "olmo2": {},
    "granite": {"embedding_multiplier": 2.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5},
    "cohere2": {"sliding_window": 80, "layer_types": ALTERNATING},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "ministral3": {
        "head_dim": 16,
        "sliding_window": 80,
        # queries grow from position 64 on, as they do in the real models from 16,384 on
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 64.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "gpt_oss": {"head_dim": 16, "sliding_window": 80, "num_local_experts": 2, "num_experts_per_tok": 1},
}
"""Families and what their tiny configs need beside the common part."""


def five_layers(family: str) -> dict[str, Any]:
    """Returns what `tiny_model` takes for five layers, of which some are alike in every family."""
    types = {"layer_types": [*["sliding_attention", "full_attention"] * 2, "sliding_attention"]}
    return {"num_hidden_layers": 5, **(types if "layer_types" in TINY[family] else {})}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--builds`."""
    parser.addoption(
        "--builds", action="store_true", help="build what is recorded as checked too, and record what passes"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Records builds, in the process that reports."""
    if config.getoption("builds") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(builds.Recorder())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out builds that are recorded as they are, and tests that are for other processes than this."""
    builds.leave_out(items, none=config.getoption("builds"))
    others = gpu.leave_out(items)
    if others:
        config.hook.pytest_deselected(items=others)


def pytest_collection_finish() -> None:
    """Takes what is imported by now out of garbage collections: each would look through it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Has the interpreter end as ever."""
    gc.unfreeze()


SEEDS = 30
"""Seeds of a test marked `seeds(count)` that `make test` runs: all instruction sets, dtypes and formats occur in them."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives a test marked `seeds(count)` its `seed`; those from `SEEDS` on are heavy. See `gpu.parametrize` too."""
    for mark in metafunc.definition.iter_markers("seeds"):
        rest = (pytest.param(seed, marks=pytest.mark.heavy) for seed in range(SEEDS, *mark.args))
        metafunc.parametrize("seed", [*range(SEEDS), *rest])
    gpu.parametrize(metafunc)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Tiny models run faster on one thread, and leave the other cores alone; the real model gets them all."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(CORES if request.node.get_closest_marker("real") else 1)


class _ThisProcess:
    """Stands in for `subprocess` where a checkpoint that was just written is loaded by a script."""

    @staticmethod
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        import torch

        given = sys.argv
        script = command.index("-c") + 1
        sys.argv = ["-c", *command[script + 1 :]]
        try:
            with torch.random.fork_rng(devices=[]):
                exec(command[script], {"__name__": "__main__"})
        except Exception as error:
            return SimpleNamespace(returncode=1, stderr=f"{type(error).__name__}: {error}")
        finally:
            sys.argv = given
        return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture(scope="session", autouse=True)
def _checkpoints_are_loaded_here() -> Iterator[None]:
    """Lets exports and heals load what they wrote in this process: a fresh one is seconds of importing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moacompress.exporter.fresh.subprocess", _ThisProcess)
        yield


@pytest.fixture(autouse=True)
def _fresh_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a test marked `fresh_process` what the product does."""
    if request.node.get_closest_marker("fresh_process"):
        monkeypatch.setattr("moacompress.exporter.fresh.subprocess", subprocess)


@pytest.fixture(scope="session")
def preloaded() -> Iterator[Preloaded]:
    """Returns what runs commands in processes of their own that need not import anything."""
    made = Preloaded()
    yield made
    made.close()


@pytest.fixture(scope="session")
def load_script() -> Callable[[Path], Any]:
    """Returns a function that loads a script as a module, which is on no path of Python's."""

    def load(path: Path) -> Any:
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # it imports what lies beside it, as where it is run
        spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look for the module of their class
        spec.loader.exec_module(module)
        return module

    return load


def tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Returns a tiny random dense model: `tiny_model("qwen3", num_hidden_layers=2, seed=1)`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # random weights of the usual size give near-uniform attention, under which every mask looks alike
        "initializer_range": 0.2,
        **TINY.get(family, {}),
        **overrides,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{k: v for k, v in settings.items() if v is not None})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="session", name="tiny_model")
def _tiny_model() -> Callable[..., PreTrainedModel]:
    return tiny_model


@pytest.fixture(scope="session")
def families() -> tuple[str, ...]:
    """All families of `TINY`."""
    return tuple(TINY)


@pytest.fixture(params=TINY)
def family(request: pytest.FixtureRequest) -> str:
    """Every family of `TINY` in turn: a test that asks for it passes through all of them."""
    return str(request.param)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Returns a character-level tokenizer with a chat template: one token a character, ids below 160."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import Fuse
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
    letters = ["\n", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(special + letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@pytest.fixture(scope="session")
def environment() -> dict[str, Any]:
    """Returns the environment as `doctor` sees it, which does not change; no fresh process is asked whether it registers."""
    from moacompress.doctor import checks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "_check_autoload", lambda: {"registered": True, "switch": None, "reason": None})
        return checks.check_environment()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """Returns a folder with a tiny dense Llama, its tokenizer and a licence file; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "dense"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("Licence of the tiny model.\n")
    return folder


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of long texts; do not write into it."""
    folder = tmp_path_factory.mktemp("prose")
    for name in ("a", "b", "c"):
        lines = (f"On day {n} of {name} there were {n * n} of them, and nobody said a word." for n in range(400))
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    return folder


@pytest.fixture
def source(tiny_tokenizer: PreTrainedTokenizerBase) -> SourceModel:
    """Returns a tiny Llama as `load_source` gives a real model."""
    from moacompress.models.source import SourceModel, model_shape

    model = tiny_model("llama")
    return SourceModel(model, tiny_tokenizer, "tiny", model_shape(model), 4096)


@pytest.fixture(scope="session")
def small_run() -> dict[str, Any]:
    """Returns the recipe of a whole run that takes seconds on a tiny model, but for the model."""
    return {
        "budget": "50%",
        "calibration": {
            "sources": [{"generator": "needle"}],
            "lengths": [700, 800],
            "samples": 4,
            "validation_samples": 2,
            "answer_tokens": 4,
        },
        "profile": {"draws": 1},
        "search": {"trials": 3},
        "evaluation": {"tasks": ["code-question", "needle-noise"], "lengths": [700], "prompts": 2},
    }


@pytest.fixture(scope="session")
def random_plan() -> Callable[..., Plan]:
    """Returns a function that draws a sparse plan for a shape: `random_plan(shape, seed=3)`; with `formats` any of each."""
    from tests import plan_kinds

    return plan_kinds.random_plan


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """Returns a run's folder with a tiny compressed checkpoint under `model/`; do not write into it."""
    from moacompress.models.source import model_shape
    from moacompress.runtime import attach
    from tests.plan_kinds import random_plan

    folder = tmp_path_factory.mktemp("compressed") / "OUT"
    model = tiny_model("llama")
    plan = random_plan(model_shape(model), seed=1)
    attach(model, plan).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    plan.save(folder / "model" / "plan.json")
    return folder


@pytest.fixture(scope="session")
def kernels_cannot_run() -> Callable[[str | None], None]:
    """Skips a test that needs the compiled kernels, for a reason; fails it where they are required."""

    def give_up(reason: str | None) -> None:
        message = f"the compiled kernels do not run: {reason}"
        if os.environ.get("MOACOMPRESS_REQUIRE_EXT") == "1":
            pytest.fail(f"{message}, and MOACOMPRESS_REQUIRE_EXT=1")
        pytest.skip(message)

    return give_up


@pytest.fixture
def isa(kernels_cannot_run: Callable[[str | None], None]) -> Iterator[Callable[[str], None]]:
    """Chooses an instruction set for a test, and the best one again after it; skips where the processor lacks it."""
    from moacompress.core.errors import UsageError
    from moacompress.kernels.cpu import library

    built = library.load()
    if built.isa is None:
        kernels_cannot_run(built.reason)

    def choose(name: str) -> None:
        try:
            library.set_isa(name)
        except UsageError as error:
            pytest.skip(str(error))

    yield choose
    assert built.isa is not None
    library.set_isa(built.isa)


@pytest.fixture(scope="session")
def counting(load_script: Callable[[Path], Any]) -> Any:
    """A backend that counts its calls; see `counting_backend.py`."""
    return load_script(ROOT / "tests/counting_backend.py").CountingBackend()


@pytest.fixture(scope="session", autouse=True)
def _wanted_backend(request: pytest.FixtureRequest) -> None:
    """Runs all tests on the backend that MOACOMPRESS_TEST_BACKEND names."""
    wanted = os.environ.get("MOACOMPRESS_TEST_BACKEND")
    if wanted:
        from moacompress.kernels import dispatch

        backend = request.getfixturevalue("counting")
        assert wanted == backend.name, f"MOACOMPRESS_TEST_BACKEND is {wanted!r}; there is only {backend.name!r}"
        dispatch.register(backend)


@pytest.fixture
def use_backend(
    counting: Any,
    kernels_cannot_run: Callable[[str | None], None],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Callable[[str], Any]]:
    """Returns a function that makes all attention of the test run on a backend, by its name, and returns it.

    Triton's is its interpreter's on the CPU; by the name `gpu.TRITON`, or where the fixture is given that, it is on a card.
    """
    from moacompress.kernels import dispatch

    dispatch.backends()  # those of installed packages are registered
    monkeypatch.setattr(dispatch, "_backends", dispatch._backends)  # what a test registers is gone after it
    before = os.environ.get(dispatch.VARIABLE)

    def use(name: str) -> Any:
        if name == "triton":
            name = getattr(request, "param", name)
        if name == gpu.TRITON:
            from tests.on_device import OnDevice

            name = OnDevice.name
            monkeypatch.setattr(dispatch, "_backends", {**dispatch._backends, name: OnDevice("cuda")})
        elif name == "triton" and not gpu.asked():
            pytest.importorskip("triton")
            monkeypatch.setenv(gpu.INTERPRET, "1")
        if name == counting.name:
            dispatch.register(counting)
        backend = next(backend for backend in dispatch.backends() if backend.name == name)
        if not backend.status().works:
            kernels_cannot_run(backend.status().reason)
        os.environ[dispatch.VARIABLE] = name
        dispatch.forget()
        return backend

    yield use
    os.environ.pop(dispatch.VARIABLE, None)
    if before is not None:
        os.environ[dispatch.VARIABLE] = before
    dispatch.forget()


@pytest.fixture
def triton(use_backend: Callable[[str], Any]) -> Any:
    """The kernels in Triton, for all attention of the test: by the interpreter, or on the GPU where a process is for that."""
    return use_backend("triton")


@pytest.fixture
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors are filled with NaN, so that what is not written shows."""
    import torch

    on_a_gpu = request.node.get_closest_marker("gpu") is not None  # where some of what is called has no other way
    torch.use_deterministic_algorithms(True, warn_only=on_a_gpu)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def pretend_device(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Returns a function whose context has a device that is not there."""
    import ctypes

    import torch

    from tests import pretend_device as pretending

    compiler, folder = shutil.which("c++") or shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None:
        pytest.skip("no C++ compiler gives PyTorch a guard for the device")
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    source = ROOT / "tests" / "no_device_guard.cpp"
    includes = [f"-I{folder / 'include'}", f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}"]
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", source, "-o", library, *includes, "-lc10"], check=True)
    ctypes.CDLL(str(library))
    return pretending.pretend_device


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Returns the folder of the dense SmolLM2-135M-Instruct in float32 (`make test-data` fetches it)."""
    given = os.environ.get("MOACOMPRESS_TEST_MODEL")
    if given:
        return Path(given)
    from filelock import FileLock

    from moacompress.exporter.exporting import save_dense

    gguf = next(iter(sorted((ROOT / ".cache").glob("**/SmolLM2-135M-Instruct*.gguf"))), None)
    if gguf is None:
        pytest.fail("the real model is not there; run `make test-data`")
    folder = ROOT / ".cache" / "smollm2-135m-dense"
    with FileLock(f"{folder}.lock"):  # several processes may want it
        if not folder.exists():
            save_dense(gguf, folder, dtype="float32")
    return folder


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Returns the .gguf file of Gemma 3 270M, whose windows are 512 tokens in five of six layers (`make gemma`)."""
    given = os.environ.get("MOACOMPRESS_TEST_GEMMA")
    found = [Path(given)] if given else sorted((ROOT / ".cache").glob("**/gemma-3-270m*.gguf"))
    if not found:
        pytest.fail("Gemma 3 270M is not there; run `make gemma`")
    return found[0]
