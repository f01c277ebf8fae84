"""voicepool keeps voice agents warm on Kubernetes."""

__version__ = "0.1.0"
