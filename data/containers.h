// Containers: a list that grows, a hash table, a heap.
// Gives: grow, Table, table_find, table_get, table_put, table_free, Heap, heap_push, heap_pop. Needs: dev/util.h.
#pragma once
#include "../dev/util.h"

// Makes `list`, of `count` elements of `size` bytes, large enough for one more. Its memory doubles
// at every power of two.
void *grow(void *list, size_t count, size_t size) {
    if (count & (count - 1)) {
        return list;
    }
    return reallocate(list, count ? 2 * count : 1, size);
}

// One key of a Table and its value. The value 0 means that there is no such key.
typedef struct Entry {
    size_t start, length; // the key's bytes, in Table.bytes
    int64_t value;
} Entry;

// A hash table from keys of any bytes to numbers other than 0. All zero is an empty table.
typedef struct Table {
    Entry *entries;         // (entry_count), at most every second one in use
    size_t entry_count;     // a power of two
    size_t count;           // keys
    char *bytes;            // of all keys, one behind the other
    size_t used, allocated; // bytes of `bytes`
} Table;

uint64_t hash_bytes(const char *s, size_t n) {
    uint64_t h = n, chunk = 0;

    // Eight bytes at a time, then the rest with zeros behind it.
    while (n >= 8) {
        memcpy(&chunk, s, 8);
        h = hash64(h ^ chunk);
        s += 8;
        n -= 8;
    }
    if (n == 0) {
        return h;
    }
    chunk = 0;
    memcpy(&chunk, s, n);
    return hash64(h ^ chunk);
}

// The entry of a key, or the free one that a new key takes: the first free one from its hash on.
Entry *table_find(const Table *t, const char *key, size_t n) {
    for (size_t i = (size_t)hash_bytes(key, n);; i++) {
        Entry *e = &t->entries[i & (t->entry_count - 1)];
        if (!e->value || (e->length == n && memcmp(t->bytes + e->start, key, n) == 0)) {
            return e;
        }
    }
}

// The value of a key of n bytes, 0 if the table does not have it.
int64_t table_get(const Table *t, const void *key, size_t n) {
    return t->entry_count ? table_find(t, (const char *)key, n)->value : 0;
}

// A pointer to the value of a key of n bytes. A new key has the value 0 and must get another.
int64_t *table_put(Table *t, const void *key, size_t n) {
    // A search is short while half of the entries are free, so a fuller table doubles.
    if (2 * t->count >= t->entry_count) {
        Table old = *t;
        t->entry_count = old.entry_count ? 2 * old.entry_count : 1024;
        t->entries = (Entry *)allocate(t->entry_count, sizeof(Entry));
        for (size_t i = 0; i < old.entry_count; i++) {
            const Entry *e = &old.entries[i];
            if (e->value) {
                *table_find(t, t->bytes + e->start, e->length) = *e;
            }
        }
        free(old.entries);
    }

    // A new key is copied behind the others.
    Entry *e = table_find(t, (const char *)key, n);
    if (!e->value) {
        if (n > t->allocated - t->used) {
            t->allocated = 2 * t->allocated + n;
            t->bytes = (char *)reallocate(t->bytes, t->allocated, 1);
        }
        memcpy(t->bytes + t->used, key, n);
        e->start = t->used;
        e->length = n;
        t->used += n;
        t->count++;
    }
    return &e->value;
}

void table_free(Table *t) {
    free(t->entries);
    free(t->bytes);
    memset(t, 0, sizeof(*t));
}

typedef struct Item {
    int64_t first, second; // ordered by `first`, equal ones by `second`
} Item;

// A binary heap: the smallest item comes out first. Items 2i+1 and 2i+2 are not before item i.
typedef struct Heap {
    Item *items; // (count)
    size_t count;
} Heap;

int item_before(Item a, Item b) {
    return a.first != b.first ? a.first < b.first : a.second < b.second;
}

void heap_push(Heap *h, int64_t first, int64_t second) {
    Item item = {first, second};
    h->items = (Item *)grow(h->items, h->count, sizeof(Item));

    // The new item rises from the end: parents that belong behind it move down.
    size_t i = h->count++;
    while (i > 0 && item_before(item, h->items[(i - 1) / 2])) {
        h->items[i] = h->items[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    h->items[i] = item;
}

// Takes the smallest item out of a heap that is not empty.
Item heap_pop(Heap *h) {
    Item top = h->items[0];
    Item last = h->items[--h->count];

    // The last item sinks from the top: the smaller of two children moves up while it is before it.
    size_t i = 0;
    while (2 * i + 1 < h->count) {
        size_t child = 2 * i + 1;
        if (child + 1 < h->count && item_before(h->items[child + 1], h->items[child])) {
            child++;
        }
        if (!item_before(h->items[child], last)) {
            break;
        }
        h->items[i] = h->items[child];
        i = child;
    }
    h->items[i] = last;
    return top;
}
