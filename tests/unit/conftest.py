"""Settings of the unit tests."""

from hypothesis import settings

# How long an example takes depends on what else the machine does.
settings.register_profile("voicepool", deadline=None)
settings.load_profile("voicepool")
