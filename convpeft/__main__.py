"""``python -m convpeft``: the command line, as ``convpeft`` is."""

from convpeft_commands import main

if __name__ == "__main__":
    main(prog_name="convpeft")
