/** Strings of src/views/answer*.ts. */
export const answerWords = {} as const
