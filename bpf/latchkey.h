/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What Latchkey's BPF programs share with each other and, through bpf2go, with
 * Go. One header: a structure defined twice is a structure that will differ.
 */
#ifndef LATCHKEY_H
#define LATCHKEY_H

#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/types.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define TCP_STATE_CLOSE 7
#define ENOMSG 42

/* Bounds. Each is per owner, never shared, so that one pod's flood costs only
 * that pod (docs/threat-model.md, "flooding"). */
#define MAX_ADDRESSES 8	      /* agent addresses of one family */
#define MAX_PORTS 4	      /* agent ports */
#define INFLIGHT_PER_POD 256  /* handshakes not yet accepted, a power of two */
#define MAX_KUBEPODS_LEVEL 16 /* depth of the kubepods cgroup */
#define MAX_PODS 4096	      /* pod-level cgroups with a ring */
#define MAX_PENDING (1 << 18) /* 1,024 pods at their bound at once */

/*
 * struct evidence is what is known of a connection when it is opened. Go reads
 * it as bpf.AttributionEvidence; the fields are explained at
 * evidence.Connection.
 */
struct evidence {
	__u64 task_cgroup;
	__u64 socket_cgroup;
	__u64 netns_cookie;
	__u64 socket_cookie;
	__u64 connected_ns;
	__u32 netns_inode;
	__u32 tgid;
	__u32 uid;
	__u32 pad;
};

/* struct peers is a connection's two ends as the client sees them. IPv4 is held
 * as v4-mapped IPv6, so that one compare serves every family. */
struct peers {
	__be32 client[4];
	__be32 server[4];
	__u32 client_port; /* host order */
	__u32 server_port; /* host order */
};

/* struct client lives in the sk_storage of the connecting socket. */
struct client {
	struct evidence ev;
	__u64 nonce; /* 0: none pending */
	__u64 owner; /* cgroup that the bound is counted for */
	__u32 armed; /* evidence noted by connect and not used yet */
	__u32 pad;
};

/* struct handshake is on its way from the client socket to the accepted one. */
struct handshake {
	struct evidence ev;
	struct peers peers;
};

/*
 * struct ring is one pod's ring of nonces. A new handshake takes the place
 * of the pod's own oldest, whose pending entry is deleted: a counter would have
 * to be decremented on every path a handshake can end on, and one missed path
 * would shut the pod out for good.
 */
struct ring {
	struct bpf_spin_lock lock;
	__u32 next;
	__u64 nonce[INFLIGHT_PER_POD];
};

struct blank_ring {
	__u64 zero[sizeof(struct ring) / sizeof(__u64)];
};

/* struct siphash_key is the SipHash key, from crypto/rand at load. */
struct siphash_key {
	__u64 k0;
	__u64 k1;
};

/* enum event counts what happened, above all what failed: a map that refuses an
 * update is a refused pod, and the metrics must say so. */
enum event {
	EVENT_CONNECT,		    /* evidence noted */
	EVENT_NONCE_SENT,	    /* handshake begun with a nonce */
	EVENT_ATTESTED,		    /* evidence moved to an accepted socket */
	EVENT_EVICTED,		    /* pod over its bound lost its oldest handshake */
	EVENT_CLOSED_UNUSED,	    /* client closed before it was accepted */
	EVENT_NO_OPTION,	    /* accepted without a nonce */
	EVENT_NONCE_UNKNOWN,	    /* accepted with a nonce nobody was given */
	EVENT_PEER_MISMATCH,	    /* nonce of another connection */
	EVENT_NONCE_RACE,	    /* nonce used twice at once */
	EVENT_ERR_CLIENT_STORAGE,   /* no sk_storage for the client socket */
	EVENT_ERR_NO_TCP_SOCK,	    /* socket is no TCP socket to the kernel */
	EVENT_ERR_INFLIGHT,	    /* no ring for the pod */
	EVENT_ERR_PENDING,	    /* pending map refused the entry */
	EVENT_ERR_FLAGS,	    /* sock_ops callbacks could not be asked for */
	EVENT_ERR_OPTION_SPACE,	    /* no room for the option */
	EVENT_ERR_OPTION_WRITE,	    /* option could not be written */
	EVENT_ERR_OPTION_READ,	    /* option could not be read */
	EVENT_ERR_ACCEPTED_STORAGE, /* no sk_storage for the accepted socket */
	EVENT_ERR_NO_KEY,	    /* nonce key not set */
	EVENT_MAX,
};

/*
 * The TCP option, RFC 6994 shared experimental kind: ExID 0x4c4b ("LK"), then
 * the nonce. Twelve bytes: with MSS, SACK-permitted, timestamps and window
 * scale a SYN has 20 of its 40 left.
 */
#define OPTION_KIND 254
#define OPTION_EXID_HI 0x4c
#define OPTION_EXID_LO 0x4b

struct option {
	__u8 kind;
	__u8 len;
	__u8 exid[2];
	__u8 nonce[8];
};

/*
 * PROTECTED(P) is constant in the object that ships: the compiler removes it and
 * the branch. An object for tests, compiled with -DLATCHKEY_PROOF, can have one
 * protection turned off, so that a test can show that its attack succeeds then.
 */
#ifdef LATCHKEY_PROOF
#define PROOF_NONCE 1	     /* who comes from the right addresses needs no nonce */
#define PROOF_PEER_TUPLE 2   /* a nonce is good from anywhere */
#define PROOF_CONSUME_ONCE 4 /* ... and any number of times */
#define PROOF_POD_BOUND 8    /* all pods share one ring */
#define PROOF_AGENT_NETNS 16 /* any listener takes evidence */
#define PROTECTED(P) (!(proof_off & PROOF_##P))
#else
#define PROTECTED(P) true
#endif

/* The parts of kernel structures that are read, relocated at load. */
struct kernfs_node {
	__u64 id;
} __attribute__((preserve_access_index));

struct cgroup {
	struct kernfs_node *kn;
} __attribute__((preserve_access_index));

struct ns_common {
	unsigned int inum;
} __attribute__((preserve_access_index));

struct net {
	struct ns_common ns;
} __attribute__((preserve_access_index));

typedef struct {
	struct net *net;
} possible_net_t;

struct sock_common {
	possible_net_t skc_net;
} __attribute__((preserve_access_index));

struct sock_cgroup_data {
	struct cgroup *cgroup; /* Linux 5.15, commit 8520e224f547 */
} __attribute__((preserve_access_index));

/* Before that the pointer shared its word with the cgroup v1 class id. */
struct sock_cgroup_data___old {
	__u64 val;
} __attribute__((preserve_access_index));

struct sock {
	struct sock_common __sk_common;
	struct sock_cgroup_data sk_cgrp_data;
} __attribute__((preserve_access_index));

struct tcp_sock {
	char opaque[0];
} __attribute__((preserve_access_index));

static __always_inline __u64 rotl64(__u64 x, int b)
{
	return (x << b) | (x >> (64 - b));
}

#define SIPROUND                     \
	do {                         \
		v0 += v1;            \
		v1 = rotl64(v1, 13); \
		v1 ^= v0;            \
		v0 = rotl64(v0, 32); \
		v2 += v3;            \
		v3 = rotl64(v3, 16); \
		v3 ^= v2;            \
		v0 += v3;            \
		v3 = rotl64(v3, 21); \
		v3 ^= v0;            \
		v2 += v1;            \
		v1 = rotl64(v1, 17); \
		v1 ^= v2;            \
		v2 = rotl64(v2, 32); \
	} while (0)

/*
 * siphash24 is SipHash-2-4 (Aumasson and Bernstein, 2012) of three words. The
 * kernel's prandom is linear: who sees some of its outputs knows the next, and
 * a pod sees the nonces of its own connections.
 */
static __always_inline __u64 siphash24(const struct siphash_key *key, __u64 a, __u64 b, __u64 c)
{
	__u64 v0 = key->k0 ^ 0x736f6d6570736575ULL;
	__u64 v1 = key->k1 ^ 0x646f72616e646f6dULL;
	__u64 v2 = key->k0 ^ 0x6c7967656e657261ULL;
	__u64 v3 = key->k1 ^ 0x7465646279746573ULL;
	__u64 last = 24ULL << 56; /* length in bytes, in the top byte */

	v3 ^= a;
	SIPROUND;
	SIPROUND;
	v0 ^= a;
	v3 ^= b;
	SIPROUND;
	SIPROUND;
	v0 ^= b;
	v3 ^= c;
	SIPROUND;
	SIPROUND;
	v0 ^= c;
	v3 ^= last;
	SIPROUND;
	SIPROUND;
	v0 ^= last;
	v2 ^= 0xff;
	SIPROUND;
	SIPROUND;
	SIPROUND;
	SIPROUND;
	return v0 ^ v1 ^ v2 ^ v3;
}

#endif
