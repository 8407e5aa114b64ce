/* pyxis's srun options on a machine without containers: each task gets a root of its own, made of bind mounts.
 *
 *   required container.so image=NAME new=DIR keep=DIR...     (plugstack.conf)
 *
 * An image is one of the names given as image=, or a readable file that ends in .sqsh. What a task sees is this
 * machine's /usr, /etc and the like, the folders named by keep=, and what --container-mounts asks for: not /tmp, not
 * /home, no shared storage. Options that are not registered here are refused by srun, as on a cluster without them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(container, 1);

static char *image, *mounts, *workdir;

static int take(int which, const char *text, int remote)
{
	char **const slots[] = { &image, &mounts, &workdir };
	(void)remote;
	*slots[which] = strdup(text);
	return 0;
}

static struct spank_option options[] = {
	{ "container-image", "IMAGE", "run the tasks in this image", 1, 0, take },
	{ "container-mounts", "SRC:DST[:FLAGS][,...]", "and show them these folders", 1, 1, take },
	{ "container-workdir", "DIR", "and begin there", 1, 2, take },
	SPANK_OPTIONS_TABLE_END
};

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
	int i;

	(void)argc, (void)argv;
	if (spank_context() != S_CTX_LOCAL && spank_context() != S_CTX_REMOTE && spank_context() != S_CTX_ALLOCATOR)
		return 0;
	for (i = 0; options[i].name; i++)
		if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS)
			return -1;
	return 0;
}

static int known(int argc, char **argv)
{
	size_t length = strlen(image);
	int i;

	if (length > 5 && !strcmp(image + length - 5, ".sqsh"))
		return !access(image, R_OK);
	for (i = 0; i < argc; i++)
		if (!strncmp(argv[i], "image=", 6) && !strcmp(argv[i] + 6, image))
			return 1;
	return 0;
}

/* Make a path under the new root: folders, and an empty file at its end if it is to be a file's place. */
static void make_place(char *path, int is_folder)
{
	FILE *file;
	char *slash;

	for (slash = path + 1; (slash = strchr(slash, '/')); slash++) {
		*slash = 0;
		mkdir(path, 0755);
		*slash = '/';
	}
	if (is_folder)
		mkdir(path, 0755);
	else if ((file = fopen(path, "a")))
		fclose(file);
}

static int show(const char *source, const char *root, const char *target, int read_only)
{
	char place[2 * PATH_MAX];
	struct stat info;

	if (stat(source, &info)) {
		slurm_error("pyxis: couldn't mount %s: No such file or directory", source);
		return -1;
	}
	snprintf(place, sizeof place, "%s%s", root, target);
	make_place(place, S_ISDIR(info.st_mode));
	if (mount(source, place, NULL, MS_BIND | MS_REC, NULL)
	    || (read_only && mount(NULL, place, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL))) {
		slurm_error("pyxis: couldn't mount %s on %s: %m", source, target);
		return -1;
	}
	return 0;
}

static int show_system(const char *root)
{
	static const char *const names[] = { "bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "opt", "var",
					     "dev", "proc", "sys" };
	char path[64], link[PATH_MAX], place[PATH_MAX];
	struct stat info;
	size_t i;

	for (i = 0; i < sizeof names / sizeof *names; i++) {
		snprintf(path, sizeof path, "/%s", names[i]);
		if (lstat(path, &info))
			continue;
		snprintf(place, sizeof place, "%s%s", root, path);
		memset(link, 0, sizeof link);
		if (S_ISLNK(info.st_mode) ? readlink(path, link, sizeof link - 1) < 0 || symlink(link, place)
					  : show(path, root, path, 0))
			return -1;
	}
	snprintf(place, sizeof place, "%s/tmp", root);
	return mkdir(place, 0) || chmod(place, 01777);
}

static int show_asked(const char *root)
{
	char *rest, *entry, *target, *flags;

	for (entry = mounts ? strtok_r(mounts, ",", &rest) : NULL; entry; entry = strtok_r(NULL, ",", &rest)) {
		flags = NULL;
		if ((target = strchr(entry, ':')))
			*target++ = 0;
		if (target && (flags = strchr(target, ':')))
			*flags++ = 0;
		if (show(entry, root, target ? target : entry, flags && !strcmp(flags, "ro")))
			return -1;
	}
	return 0;
}

/* As root, in the task's own process, before it becomes the user. */
int slurm_spank_task_init_privileged(spank_t spank, int argc, char **argv)
{
	const char *root = NULL;
	int i;

	(void)spank;
	if (!image)
		return 0;
	if (!known(argc, argv)) {
		slurm_error("pyxis: failed to import docker image: %s: no such image", image);
		return -1;
	}
	for (i = 0; i < argc; i++)
		if (!strncmp(argv[i], "new=", 4))
			root = argv[i] + 4;
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)
	    || mount("tmpfs", root, "tmpfs", 0, "mode=0755") || show_system(root)) {
		slurm_error("pyxis: couldn't make the container: %m");
		return -1;
	}
	for (i = 0; i < argc; i++)
		if (!strncmp(argv[i], "keep=", 5) && show(argv[i] + 5, root, argv[i] + 5, 1))
			return -1;
	if (show_asked(root) || chdir(root) || mount(root, "/", NULL, MS_MOVE, NULL) || chroot(".")) {
		slurm_error("pyxis: couldn't enter the container: %m");
		return -1;
	}
	return 0;
}

/* As the user. */
int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
	(void)spank, (void)argc, (void)argv;
	if (image && chdir(workdir ? workdir : "/")) {
		slurm_error("pyxis: couldn't chdir to %s: %m", workdir);
		return -1;
	}
	return 0;
}
