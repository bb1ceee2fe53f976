"""An examination of anyone's distillation loss against fp64 truth."""

from .report import Audit, Line, Verdict
from .run import audit

__all__ = ["Audit", "Line", "Verdict", "audit"]
