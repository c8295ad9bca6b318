"""`python -m albert.finetune`."""

from albert.finetune.cli import main

if __name__ == "__main__":
    main()
