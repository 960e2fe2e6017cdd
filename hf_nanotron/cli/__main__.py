"""`python -m hf_nanotron.cli`, as `torchrun` starts it on every rank."""

from .main import main

if __name__ == "__main__":
    main()
