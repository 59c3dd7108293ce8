"""Drop-in faces: mlakit's operations under the names and conventions of other libraries."""
