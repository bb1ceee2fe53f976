"""Cached teachers: run once, kept in a folder, found by what each sequence is."""

from .errors import CacheError, CacheMiss
from .manifest import Manifest
from .reader import Report, TeacherCache
from .writer import CacheWriter

__all__ = ["CacheError", "CacheMiss", "CacheWriter", "Manifest", "Report", "TeacherCache"]
