"""Images, packaged, downloaded, anybody's or drawn from a model: bytes on the device."""
