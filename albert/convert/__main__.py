"""`python -m albert.convert`."""

from albert.convert.cli import main

main()
