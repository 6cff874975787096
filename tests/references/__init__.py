"""Slow, obvious implementations that convpeft never imports; tests compare against them."""
