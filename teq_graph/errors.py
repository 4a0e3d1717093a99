"""The exception tree.

Every refusal names the thing (argument, node, module, file), the value it had and what is accepted.

TeqGraphError
├── ConfigError        a configuration value outside what is accepted
├── CaptureError       torch.export refuses the model, or the model is not in a state to be captured
├── InputError         inputs, calibration data or prompts that the graph cannot take
├── NumericsError      NaN or infinity where only finite numbers make sense
├── EquivalenceError   a scale that would not leave the float output unchanged
├── PassError          a pass that failed, for another reason than a refusal
├── ExportError        the ONNX directory cannot be written
├── ModelFileError     a file or directory that cannot be read as a model
└── KernelError        no kernel for this device, dtype or shape
"""

import reprlib
import textwrap


class TeqGraphError(Exception):
    """Base of every error that teq_graph raises on purpose."""


class ConfigError(TeqGraphError, ValueError):
    """A configuration value is outside what is accepted."""


class CaptureError(TeqGraphError):
    """The model cannot be captured as a graph."""


class InputError(TeqGraphError, ValueError):
    """Inputs, calibration data or a prompt that the graph cannot take."""


class NumericsError(TeqGraphError):
    """NaN or infinity in weights, calibration data or results."""


class EquivalenceError(TeqGraphError):
    """A scale that would change the float output."""


class PassError(TeqGraphError):
    """A graph pass failed."""


class ExportError(TeqGraphError):
    """The output directory cannot be written."""


class ModelFileError(TeqGraphError):
    """A file or directory that cannot be read as a model."""


class KernelError(TeqGraphError):
    """No kernel for this device, dtype or shape."""


_LONGEST = 300
"""Characters of another library's message that are worth a line."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def one_line(error: BaseException) -> str:
    """What an exception of another library says, for the end of a refusal: the first paragraph in one line.

    Cut between words where it is long; of an OSError what the system says, without the file, which the refusal names.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error} is missing"
    paragraph = str(error).strip().partition("\n\n")[0]
    return textwrap.shorten(paragraph, _LONGEST, placeholder=" …", break_on_hyphens=False) or type(error).__name__


def brief(value: object) -> str:
    """A value that was given, for a refusal: its repr in one short line, also where it has none."""
    try:
        shown = " ".join(_SHORT.repr(value).split())
    except Exception:  # of a very long integer, or of a class of the caller's own
        return f"<{type(value).__name__}>"
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 2]} …"
