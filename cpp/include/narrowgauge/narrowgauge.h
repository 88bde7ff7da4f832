/* The C interface: narrow matrices over opaque handles, for other languages and engines. */
#ifndef NARROWGAUGE_NARROWGAUGE_H
#define NARROWGAUGE_NARROWGAUGE_H

#ifdef __cplusplus
extern "C" {
#endif

/* "major.minor.patch"; static storage. */
const char* ng_version(void);

#ifdef __cplusplus
}
#endif

#endif
