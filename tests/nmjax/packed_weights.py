"""Packed weights for tests that do not care which weights they keep."""

import nmjax


def prune_and_pack(params, plan):
    """Prunes dense parameters by magnitude and packs them."""
    return nmjax.pack(nmjax.prune(params, plan), plan)
