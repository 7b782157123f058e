"""Where the time of a plan goes: its steps timed against what this machine can do.

`machine` measures the rooflines, `profile` runs a session and gives a row per step, `what_if` estimates sparser layers;
`chrome.trace_events` and `plot.draw` show the same facts to other programs and to people.
"""

from nmcompile.profile.timing import Machine, Profile, Row, grouped, machine, profile
from nmcompile.profile.what_if import WhatIf, kind_of, what_if
from nmcompile.profile.work import TimedLinear, TimedStep, steps_of

__all__ = [
    "Machine", "Profile", "Row", "TimedLinear", "TimedStep", "WhatIf", "grouped", "kind_of", "machine", "profile",
    "steps_of", "what_if",
]  # fmt: skip
