"""``python -m ttd_plugins.cli``, for launchers that start several processes of a module."""

from ttd_plugins.cli import main

if __name__ == "__main__":
    main()
