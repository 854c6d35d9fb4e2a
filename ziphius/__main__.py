"""``ziphius`` and ``python -m ziphius``."""


def main() -> None:
    """Run the command line."""
    from ziphius.cli.app import run

    run()


if __name__ == "__main__":
    main()
