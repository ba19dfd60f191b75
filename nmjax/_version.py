"""The version of nmjax. The package's build reads it from this file."""

__version__ = "0.1.0"
