"""The command line: `main` knows the names of the commands, one thin module each holds what they do.

A command's module is imported only when that command runs, so `formary --help` is quick and loads no torch.
Nothing here computes: commands read arguments, call the rooms below, and print.
"""
