"""The parts of the calibration pass; `run.py` puts them together. Data flows one way:

    windows, weights -> walk (a layer's forward pass) -> gram (its inputs' matrices) -> methods -> layout (files)

`device` says where and how precisely; `resume` keeps what an interrupted run goes on from. `sensitivity` is a pass of
its own, forward and then backward, for what each type of llama.cpp costs the output.
"""
