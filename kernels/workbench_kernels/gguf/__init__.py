"""llama.cpp's block types: a file each, the kernels that they share (`blocks`), and the table of them (`types`)."""
