/** Strings of src/views/map*.ts. */
export const mapWords = {} as const
