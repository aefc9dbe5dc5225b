"""The commands of the command line, one file each; `jbrprune.cli` gives them their names."""
