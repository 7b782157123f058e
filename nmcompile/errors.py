"""The one tree of errors that a user can mend; the command line prints them as a single line and exits 1."""

from __future__ import annotations


class NmcompileError(Exception):
    """Base of every error that names a thing of the user's and the remedy."""


class GraphError(NmcompileError):
    """The ONNX model cannot be read, written, verified or run."""


class BudgetError(GraphError):
    """The model asks for more memory, time or nodes than its size accounts for."""


class EndlessError(BudgetError):
    """A run was stopped because it took too long."""


class PassError(NmcompileError):
    """A pass, its specification or its result is not valid."""


class CalibrationError(NmcompileError):
    """The calibration data do not fit the model."""


class PlanError(NmcompileError):
    """A plan file is damaged, of another version, or does not fit this machine."""


class InputError(NmcompileError):
    """An input given to a session or a function does not fit."""


class UnsupportedError(NmcompileError):
    """What was asked for exists, but not for this model, target or machine."""


class NoDeviceError(UnsupportedError):
    """The device or its software is not on this machine; elsewhere the same would work. The command line exits 3."""
