"""Deployment: engines that compute with bits. OpenVINO is imported here alone, and only when it is used."""
