"""Convert the configuration of a huggingface/nanotron run into a YAML file for `hf-nanotron train`.

python conversions/nanotron_config.py IN.yaml OUT.yaml [--overwrite]
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_nanotron.convert.arguments import run_script


def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that the command line `argv` describes (default: `sys.argv`)."""
    run_script("nanotron-config", __doc__, argv)


if __name__ == "__main__":
    main()
