"""What is no test here: a script that runs in a process of its own."""

collect_ignore = ["interpreted.py"]
