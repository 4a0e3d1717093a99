"""From what the user gives as calibration data to batches of the model's inputs."""

from teq_graph.calibration.batches import TokenInputs, calibration_batches, make_batches
from teq_graph.calibration.decoding_step import decoding_step
from teq_graph.calibration.sources import check_source

__all__ = ["TokenInputs", "calibration_batches", "check_source", "decoding_step", "make_batches"]
