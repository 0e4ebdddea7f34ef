"""Many runs: what is left to do, and who does it, on this machine and on others."""
