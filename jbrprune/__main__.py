"""``python -m jbrprune``, which ``torchrun -m jbrprune`` starts on every rank."""

from jbrprune.cli import main

if __name__ == "__main__":
    main()
