"""Lowering to ONNX, the directory that is written, and running it with onnxruntime.

Imports nothing on purpose: generating from an exported directory needs neither torch.export nor onnxscript.
"""

import os

# Before onnxruntime is imported, which nothing outside this package does: from 1.31 on it looks up an event host of
# its vendor and writes an id of the device below the home directory, unless this says otherwise. The user's own stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
