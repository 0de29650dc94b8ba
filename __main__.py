"""``python -m enginesmith`` is the same as the ``enginesmith`` command."""

from .cli import main

if __name__ == "__main__":
    main()
