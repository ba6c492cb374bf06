from __future__ import annotations

import pytest

# The suite is part of the package; its asserts should tell as much as those of tests.
pytest.register_assert_rewrite("llama_corral.testing.queues")
