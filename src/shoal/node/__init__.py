"""All cores of one device, composed."""
