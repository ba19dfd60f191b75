"""Set before jax is imported: eight simulated devices; and how hypothesis runs."""

import os

_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import hypothesis  # noqa: E402

# Every example of another shape compiles another program, so the default run draws few. CI draws
# many: --hypothesis-profile=thorough.
hypothesis.settings.register_profile("default", deadline=None, max_examples=12)
hypothesis.settings.register_profile("thorough", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")
