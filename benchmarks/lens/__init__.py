"""What a GPU would be told to do, seen without one (`benchmarks/gpu_lens.py`).

fake_gpu   an H100 that is made of properties alone, for which Inductor writes its code; the
           one file with private names of torch and Triton
kernel     a Triton kernel of the generated code, by its text
models     the layers that are traced
passes     which launches only carry activations from one place to another
launches   the generated code, run with launches that are noted down in place of being made
lens       one layer, one way to train it: what it launches, keeps and reads
page       results as text
"""
