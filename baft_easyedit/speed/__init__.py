"""What an edit costs: time, memory and generation speed of BaFT, ReFT and EasyEdit's methods."""

from baft_easyedit.speed.options import SpeedOptions
from baft_easyedit.speed.report import SpeedReport
from baft_easyedit.speed.run import run_speed

__all__ = ["SpeedOptions", "SpeedReport", "run_speed"]
