from __future__ import annotations

import subprocess
import sys
import textwrap


def test_transformers_is_imported_on_demand_and_asked_for_where_it_lacks() -> None:
    code = textwrap.dedent(
        """
        import sys
        import mgd
        assert "transformers" not in sys.modules
        sys.modules["transformers"] = None  # as if it were not installed
        try:
            import mgd.huggingface
        except ImportError as error:
            print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "mgd.huggingface needs transformers and accelerate: `pip install transformers accelerate`, or the extra "
        "[huggingface] of this project"
    )
