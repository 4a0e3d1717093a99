"""From what the user gives as calibration data to batches of the model's inputs."""

from teq_graph.calibration.batches import TokenInputs, calibration_batches, captured_step, make_batches

__all__ = ["TokenInputs", "calibration_batches", "captured_step", "make_batches"]
