"""One run's loop: it hands units to Ray and watches over them."""
