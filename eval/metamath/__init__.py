"""Trains and measures a method by PEFT's published comparison on MetaMathQA and GSM8K.

- [`protocol`][eval.metamath.protocol]: The rows of each step, their loss, and the schedule.
- [`questions`][eval.metamath.questions]: The rows of training, validation and test.
- [`run`][eval.metamath.run]: `run_metamath`, which trains and measures.
- [`row`][eval.metamath.row]: The row of the published table, as its JSON file.
"""
