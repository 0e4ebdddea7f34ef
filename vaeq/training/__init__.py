"""The steps, the loop over them, and the state that a killed run goes on from."""
