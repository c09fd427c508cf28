// Counts the live bytes of malloc and their peak, for LD_PRELOAD.
#define _GNU_SOURCE
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <errno.h>
extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);
static atomic_long live, peak;
static void* count(void* p) {
  if (!p) return p;
  long now = atomic_fetch_add(&live, (long)malloc_usable_size(p)) + (long)malloc_usable_size(p);
  long was = atomic_load(&peak);
  while (now > was && !atomic_compare_exchange_weak(&peak, &was, now)) {}
  return p;
}
void* malloc(size_t n) { return count(__libc_malloc(n)); }
void* calloc(size_t n, size_t m) { return count(__libc_calloc(n, m)); }
void free(void* p) { if (p) atomic_fetch_sub(&live, (long)malloc_usable_size(p)); __libc_free(p); }
void* realloc(void* p, size_t n) {
  long before = p ? (long)malloc_usable_size(p) : 0;
  void* q = __libc_realloc(p, n);
  if (q || !n) atomic_fetch_sub(&live, before);
  return count(q);
}
void* memalign(size_t a, size_t n) { return count(__libc_memalign(a, n)); }
void* aligned_alloc(size_t a, size_t n) { return count(__libc_memalign(a, n)); }
int posix_memalign(void** p, size_t a, size_t n) { void* q = __libc_memalign(a, n); if (!q) return ENOMEM; *p = count(q); return 0; }
long live_bytes(void) { return atomic_load(&live); }
long peak_bytes(void) { return atomic_load(&peak); }
void reset_peak(void) { atomic_store(&peak, atomic_load(&live)); }
