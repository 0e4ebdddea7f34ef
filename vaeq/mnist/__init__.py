"""The four original MNIST files (LeCun, Cortes and Burges, 1998; CC BY-SA 3.0, see README.md)."""
