"""The variational autoencoders and the bound that they are fitted by."""
